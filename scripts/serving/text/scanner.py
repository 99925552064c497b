"""Scan generated text while it arrives, with parsers that read as if the text were complete.

A parser is a generator. It asks the `Scanner` for what it needs, and the scanner yields whenever
the text so far cannot answer yet. A parser therefore emits the same parts however the text was cut
into pieces; `tests/unit/text` checks that for every format.

The scanner knows markers and JSON values. It knows nothing of tools or of models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Runs until it needs more text, and then yields; returns T."""

Emit = Callable[[str], None]

SPACE = " \t\r\n"
_SCALAR_ENDS = ",]}" + SPACE


class Scanner:
    """The text that was fed and not consumed yet."""

    def __init__(self) -> None:
        self._text = ""
        self._ended = False

    def feed(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        """No more text will come."""
        self._ended = True

    @property
    def at_end(self) -> bool:
        return self._ended and not self._text

    def take_all(self) -> str:
        """Everything that is left."""
        text, self._text = self._text, ""
        return text

    def until(self, markers: Sequence[str], emit: Emit) -> Steps[str]:
        """Emit the text before the first marker, consume the marker and return it.

        Returns "" when the text ends without one. No marker may be the beginning of another.
        """
        while True:
            text = self._text
            found = [(start, marker) for marker in markers if (start := text.find(marker)) >= 0]
            if found:
                start, marker = min(found)
                if start:
                    emit(text[:start])
                self._text = text[start + len(marker) :]
                return marker
            keep = 0 if self._ended else _partial_chars(text, markers)
            ready = len(text) - keep
            if ready:
                emit(text[:ready])
                self._text = text[ready:]
            if self._ended:
                return ""
            yield

    def peek(self, count: int = 1) -> Steps[str]:
        """The next `count` characters, fewer at the end of the text; consumes nothing."""
        while len(self._text) < count and not self._ended:
            yield
        return self._text[:count]

    def skip_space(self) -> Steps[str]:
        """Consume white space and return it."""
        skipped = ""
        while True:
            rest = self._text.lstrip(SPACE)
            skipped += self._text[: len(self._text) - len(rest)]
            self._text = rest
            if rest or self._ended:
                return skipped
            yield

    def accept(self, *options: str) -> Steps[str]:
        """Consume the longest option that comes next and return it; "" when none does."""
        longest = max(map(len, options))
        while True:
            text = self._text
            undecided = not self._ended and any(
                len(option) > len(text) and option.startswith(text) for option in options
            )
            if not undecided or len(text) >= longest:
                hits = [option for option in options if text.startswith(option)]
                hit = max(hits, key=len, default="")
                self._text = text[len(hit) :]
                return hit
            yield

    def take_while(self, accept: Callable[[str], bool]) -> Steps[str]:
        """Consume the characters that `accept` takes, and return them."""
        taken = []
        while True:
            text = self._text
            end = next((i for i, char in enumerate(text) if not accept(char)), len(text))
            taken.append(text[:end])
            self._text = text[end:]
            if self._text or self._ended:
                return "".join(taken)
            yield

    def json_value(self, emit: Emit) -> Steps[bool]:
        """Consume one JSON value and emit its text as it arrives. False: it was cut, or is none.

        Brackets and strings are matched; what stands between them is not checked.
        """
        first = yield from self.peek()
        if first in ("{", "["):
            return (yield from self._nested(emit))
        if first == '"':
            return (yield from self._string(emit))
        scalar = yield from self.take_while(lambda char: char not in _SCALAR_ENDS)
        if scalar:
            emit(scalar)
        return bool(scalar)

    def _string(self, emit: Emit) -> Steps[bool]:
        escaped, begun = False, False
        while True:
            for i, char in enumerate(self._text):
                if escaped:
                    escaped = False
                elif char == "\\":
                    escaped = True
                elif char == '"':
                    if begun:
                        self._emit(i + 1, emit)
                        return True
                    begun = True
            self._emit(len(self._text), emit)
            if self._ended:
                return False
            yield

    def _nested(self, emit: Emit) -> Steps[bool]:
        depth, in_string, escaped = 0, False, False
        while True:
            for i, char in enumerate(self._text):
                if in_string:
                    if escaped:
                        escaped = False
                    elif char == "\\":
                        escaped = True
                    elif char == '"':
                        in_string = False
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                    if depth == 0:
                        self._emit(i + 1, emit)
                        return True
            self._emit(len(self._text), emit)
            if self._ended:
                return False
            yield

    def _emit(self, end: int, emit: Emit) -> None:
        if end:
            emit(self._text[:end])
            self._text = self._text[end:]


def _partial_chars(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest
