"""Special tokens in the text of messages and tools: `<|im_end|>` in a user's text must not end the turn.

Before a template renders them, each special token in their text is enclosed by two characters
of Unicode's private use. After rendering, what they enclose is tokenized as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

QUOTE_BEGIN, QUOTE_END = "\ue0e0", "\ue0e1"
_QUOTED = re.compile(f"{QUOTE_BEGIN}([^{QUOTE_END}]*){QUOTE_END}")


class SpecialTokenQuotes:
    """Quotes special tokens in what a request brings: messages, and the tools that it describes."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        names = sorted((name for name in special_tokens if name), key=len, reverse=True)
        escaped = [*map(re.escape, names)]
        # Apart from the quotes, names mostly share their first character, which `re` finds fast.
        self._names = re.compile("|".join(escaped)) if names else None
        self._pattern = re.compile("|".join([*escaped, QUOTE_BEGIN, QUOTE_END]))
        self._survive_json = not any(json.dumps(name) != f'"{name}"' for name in names)

    def quote(self, value: Any) -> Any:
        """`value`, JSON, with every special token in its texts quoted; itself if there is none."""
        if isinstance(value, str):
            return self._pattern.sub(_quote, value) if self._is_in(value) else value
        if isinstance(value, Mapping):
            # Keys too: a template may write the names of a tool's parameters.
            items = {self.quote(key): self.quote(each) for key, each in value.items()}
            same = all(
                new is old and items[new] is value[old]
                for new, old in zip(items, value, strict=False)
            )
            return value if same and len(items) == len(value) else items
        if isinstance(value, list):
            values = [self.quote(each) for each in value]
            changed = any(new is not old for new, old in zip(values, value, strict=True))
            return values if changed else value
        return value

    def quote_large(self, value: Any) -> Any:
        """The same as `quote`, and quicker for a large value of many texts without such tokens."""
        if self._survive_json:
            try:
                if not self._is_in(orjson.dumps(value).decode()):
                    return value
            except (TypeError, ValueError):  # integers beyond 64 bits
                pass
        return self.quote(value)

    def _is_in(self, text: str) -> bool:
        if QUOTE_BEGIN in text or QUOTE_END in text:
            return True
        return self._names is not None and self._names.search(text) is not None


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
