"""What an answer consists of: text, reasoning, and tool calls, each as it is generated.

A parser turns the detokenizer's text into parts. Every API (chat, Responses, Messages) writes the
same parts in its own format.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct


class Text(Struct, frozen=True):
    """More of the answer."""

    text: str


class Reasoning(Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class ToolCall(Struct, frozen=True):
    """A call begins. `index` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


class Arguments(Struct, frozen=True):
    """More of a call's arguments: a piece of JSON text."""

    index: int
    text: str


Part = Text | Reasoning | ToolCall | Arguments


class CompleteCall(Struct):
    """A call as a whole. `arguments` is JSON text, cut where the answer was."""

    id: str
    name: str
    arguments: str = ""


class Answer(Struct):
    """The parts of one answer, put together."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[CompleteCall] = []


def assemble(parts: Iterable[Part]) -> Answer:
    """The answer that consists of `parts`, in their order."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[CompleteCall] = []
    arguments: list[list[str]] = []
    for part in parts:
        match part:
            case Text():
                text.append(part.text)
            case Reasoning():
                reasoning.append(part.text)
            case ToolCall():
                calls.append(CompleteCall(part.id, part.name))
                arguments.append([])
            case Arguments():
                arguments[part.index].append(part.text)
    for call, pieces in zip(calls, arguments, strict=True):
        call.arguments = "".join(pieces)
    return Answer("".join(text), "".join(reasoning), calls)
