"""What a model thinks before it answers: where it begins and ends in the generated text.

Reasoning comes first in an answer, between two markers. Some templates write the first marker into
the prompt themselves, so that the generated text begins inside. Harmony's channels are read by
`tool_calls/harmony.py`, since calls and reasoning share them.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from serving.text.scanner import Scanner, Steps


class ReasoningSink(Protocol):
    """Takes what was recognised as reasoning or text."""

    is_reasoning: bool

    def reasoning(self, text: str) -> None: ...

    def text(self, text: str) -> None: ...


class ReasoningFormat(Struct, frozen=True):
    """The markers around reasoning. `header` may follow `begin` and is dropped."""

    name: str
    begin: str
    end: str
    header: str = ""
    answer_header: str = "\n\n"
    """What a model writes between `end` and its answer."""

    def is_open(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so leaves its reasoning open."""
        return prompt_end.rfind(self.begin) > prompt_end.rfind(self.end)

    def parse(self, scanner: Scanner, sink: ReasoningSink, *, inside: bool) -> Steps[None]:
        """Consume the reasoning at the beginning of an answer, if there is any."""
        if not inside:
            space = yield from scanner.skip_space()
            if not (yield from scanner.accept(self.begin)):
                sink.text(space)
                return
        sink.is_reasoning = True
        if self.header:
            yield from scanner.accept(self.header)
        yield from scanner.skip_space()
        yield from scanner.until([self.end], sink.reasoning)
        sink.is_reasoning = False
        yield from scanner.skip_space()


FORMATS = (
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat("gemma4", "<|channel>", "<channel|>", header="thought"),
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("kimi_vl", "◁think▷", "◁/think▷"),
    ReasoningFormat("think", "<think>", "</think>"),
)
BY_NAME = {each.name: each for each in FORMATS}


class ReasoningSelection(Struct, frozen=True):
    """A format, or none, and the reason for it."""

    format: ReasoningFormat | None
    reason: str


def select_reasoning(setting: str, template: str) -> ReasoningSelection:
    """`setting` is a format's name, `auto` or `none`; `template` the chat template's source."""
    if setting == "none":
        return ReasoningSelection(None, "set in the configuration")
    if setting != "auto":
        return ReasoningSelection(BY_NAME[setting], "set in the configuration")
    for each in FORMATS:
        if each.begin in template or each.end in template:
            return ReasoningSelection(each, "its markers are in the chat template")
    return ReasoningSelection(None, "the chat template has no markers for reasoning")
