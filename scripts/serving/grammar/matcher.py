"""The position of one text in its grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serving.grammar.compiler import first_line
from serving.grammar.work import WorkLimit

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.uint32]

MAX_WORK_S = 0.5
_ANY_TOKEN = np.uint32(0xFFFFFFFF)


class Matcher:
    """Follows a text. Used by one thread at a time.

    `error` is set once the text cannot go on by its grammar, and stays. `is_complete` is set once
    the text fits as a whole and nothing can follow. An error is never a completion.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        num_words: int,
        end_ids: tuple[int, ...],
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_error` is called when llguidance fails: its copies share what is broken."""
        self._matcher, self._end_ids, self._on_error = matcher, end_ids, on_error
        self._work = WorkLimit(MAX_WORK_S)
        self.num_words = num_words
        self.error = ""
        self.is_complete = False

    def allow(self, words: Words, stop_ids: Iterable[int], *, may_end: bool) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        `words` is `[num_words]`, contiguous, token `i` being bit `i % 32` of word `i // 32`. The
        text may end, by any of `stop_ids`, only where the grammar accepts it, and where it
        `may_end` unless it must. With an error, all bits are set: the text has to be dropped.
        """
        if self.error:
            words[:] = _ANY_TOKEN
            return
        with self._work.measured():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            self._fail(first_line(self._matcher.get_error()))
        elif self._work.is_exceeded:
            self._fail("finding its tokens takes too long")
        elif not self._matcher.is_accepting() and not _has_token(words, self._end_ids):
            self._fail("no token of the model continues it")
        else:
            self._restrict_end(words, stop_ids, may_end)
        if self.error:
            words[:] = _ANY_TOKEN

    def _restrict_end(self, words: Words, stop_ids: Iterable[int], may_end: bool) -> None:
        stops = [token for token in stop_ids if token < 32 * len(words)]
        if self._matcher.is_accepting() and may_end:
            _set(words, stops)
            return
        before = words.copy()
        _clear(words, (*stops, *self._end_ids))
        if not words.any():
            # Only an end can follow, or the grammar wants a token that also is a stop token.
            words[:] = before
            if self._matcher.is_accepting():
                _set(words, stops)

    def accept(self, tokens: list[int]) -> None:
        """Append `tokens` to the text."""
        if self.error:
            return
        with self._work.measured():
            is_consumed = self._matcher.consume_tokens(tokens)
        if not is_consumed or self._matcher.is_error():
            self._fail(first_line(self._matcher.get_error()))
        elif self._matcher.is_stopped():
            if self._matcher.is_accepting():
                self.is_complete = True
            else:
                self._fail(f"it ended unfinished ({self._matcher.stop_reason()})")

    def _fail(self, why: str) -> None:
        self.error = why
        self._on_error()


def _has_token(words: Words, without: Iterable[int]) -> bool:
    others = words.copy()
    _clear(others, without)
    return bool(others.any())


def _set(words: Words, tokens: Iterable[int]) -> None:
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)


def _clear(words: Words, tokens: Iterable[int]) -> None:
    for token in tokens:
        words[token // 32] &= ~np.uint32(1 << token % 32)
