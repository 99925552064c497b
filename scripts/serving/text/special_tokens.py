"""Special tokens in the text of messages: `<|im_end|>` in a user's text must not end the turn.

Before a template renders messages, each special token in their text is enclosed by two characters
of Unicode's private use. After rendering, what they enclose is tokenized as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

QUOTE_BEGIN, QUOTE_END = "\ue0e0", "\ue0e1"
_QUOTED = re.compile(f"{QUOTE_BEGIN}([^{QUOTE_END}]*){QUOTE_END}")


def special_token_pattern(special_tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens, and characters that would be taken for quotes."""
    names = sorted((name for name in special_tokens if name), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, names), QUOTE_BEGIN, QUOTE_END]))


def quote_special_tokens(
    messages: list[dict[str, Any]], pattern: re.Pattern[str]
) -> list[dict[str, Any]]:
    """The messages with every special token in their text quoted; the same list if there is none."""
    quoted = [_quoted(message, pattern) for message in messages]
    if all(new is old for new, old in zip(quoted, messages, strict=True)):
        return messages
    return quoted


def _quoted(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(_quote, value) if pattern.search(value) else value
    if isinstance(value, Mapping):
        items = {key: _quoted(each, pattern) for key, each in value.items()}
        return items if any(items[key] is not value[key] for key in items) else value
    if isinstance(value, list):
        values = [_quoted(each, pattern) for each in value]
        changed = any(new is not old for new, old in zip(values, value, strict=True))
        return values if changed else value
    return value


def _quote(match: re.Match[str]) -> str:
    text = match.group()
    # The quotes themselves cannot be quoted; as text they have no meaning anyway.
    return "" if text in (QUOTE_BEGIN, QUOTE_END) else f"{QUOTE_BEGIN}{text}{QUOTE_END}"


def split_quoted(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it was quoted), without the quotes and without empty pieces.

    A template may have cut a quote off; what is left of it is dropped.
    """
    start = 0
    for match in _QUOTED.finditer(text):
        yield from _unquoted(text[start : match.start()])
        if match.group(1):
            yield match.group(1), True
        start = match.end()
    yield from _unquoted(text[start:])


def _unquoted(text: str) -> Iterator[tuple[str, bool]]:
    text = text.replace(QUOTE_BEGIN, "").replace(QUOTE_END, "")
    if text:
        yield text, False
