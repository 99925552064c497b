"""Generated text to parts: reasoning first, then text and tool calls. One parser for each answer."""

from __future__ import annotations

from collections.abc import Mapping

from serving.text.parts import Part
from serving.text.reasoning import ReasoningFormat
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat


class AnswerParser:
    """Feed it text as it comes; the parts do not depend on how the text was cut."""

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: Mapping[str, Tool],
        reasoning: ReasoningFormat | None = None,
        *,
        starts_inside_reasoning: bool = False,
    ) -> None:
        """`tool_format` None: the answer holds no calls. `starts_inside_reasoning`: the prompt
        opened the reasoning already."""
        self._tool_format, self._tools = tool_format, tools
        self._reasoning, self._inside = reasoning, starts_inside_reasoning
        self._scanner = Scanner()
        self._collector = PartCollector(tool_format.new_id if tool_format else _no_id)
        self._steps = self._parse()
        self._steps.send(None)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._collector.num_calls

    @property
    def is_reasoning(self) -> bool:
        """Whether the latest text was reasoning that goes on."""
        return self._collector.is_reasoning

    def feed(self, text: str) -> list[Part]:
        """The parts that `text` completes or continues."""
        self._scanner.feed(text)
        self._steps.send(None)
        return self._collector.take()

    def finish(self) -> list[Part]:
        """The last parts; feed nothing afterwards."""
        self._scanner.end()
        try:
            self._steps.send(None)
        except StopIteration:
            pass
        else:
            raise AssertionError("a parser returns once its text has ended")
        self._collector.finish()
        return self._collector.take()

    def _parse(self) -> Steps[None]:
        if self._reasoning is not None:
            yield from self._reasoning.parse(self._scanner, self._collector, inside=self._inside)
        if self._tool_format is not None:
            yield from self._tool_format.parse(self._scanner, self._collector, self._tools)
        # What a format leaves is text.
        while True:
            if rest := self._scanner.take_all():
                self._collector.text(rest)
            if self._scanner.at_end:
                return
            yield


def _no_id(index: int, name: str) -> str:
    raise AssertionError("no tool format, no calls")
