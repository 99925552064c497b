"""How a model writes reasoning and tool calls: chosen once, when its tokenizer is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from tokenizers import Tokenizer

from serving.text.reasoning import ReasoningFormat, ReasoningSelection, select_reasoning
from serving.text.tool_calls.select import Selection, select_format


class AnswerFormat(Struct, frozen=True):
    """The formats of one model. `special_tokens` maps the tokenizer's to their ids."""

    tools: Selection
    reasoning: ReasoningSelection
    special_tokens: Mapping[str, int]
    tokenizer: Tokenizer

    def reasoning_end_ids(self, reasoning: ReasoningFormat) -> tuple[int, ...]:
        """Tokens that end a thought and begin the answer."""
        text = f"\n{reasoning.end}{reasoning.answer_header}"
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def describe(self) -> dict[str, str]:
        """For people: what was decided, and why."""
        if self.tools.format.reasoning is not None:
            reasoning, why = self.tools.format.name, self.tools.reason
        else:
            chosen = self.reasoning.format
            reasoning, why = chosen.name if chosen else "none", self.reasoning.reason
        return {
            "tool_parser": self.tools.format.name,
            "tool_parser_reason": self.tools.reason,
            "reasoning_parser": reasoning,
            "reasoning_parser_reason": why,
        }


def answer_format(
    tokenizer: Tokenizer, template: str, *, tool_parser: str, reasoning_parser: str
) -> AnswerFormat:
    """`template` is the source of the chat template, empty without one; the parsers are settings:
    `auto` or a format's name."""
    added = tokenizer.get_added_tokens_decoder()
    return AnswerFormat(
        select_format(tool_parser, template),
        select_reasoning(reasoning_parser, template),
        {token.content: token_id for token_id, token in added.items() if token.special},
        tokenizer,
    )
