"""Whether a guide can be used: it is compiled, and some texts of it are written.

Some limits of llguidance show only while a text grows. A guide that meets them early is refused.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from serving.grammar.compiler import GuideCompiler, first_line, not_usable
from serving.grammar.matcher import Words
from serving.grammar.work import WorkLimit
from serving.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_WORK_S = 0.25
"""Half of what the engine allows, so that a text that passes here passes there."""
_NUM_FIRSTS = 16
_NUM_TOKENS = 24
_NUM_TOKENS_OF_LONGEST = 200


def try_guide(compiler: GuideCompiler, guide: Guide) -> None:
    """Raises InvalidRequest."""
    compiled = compiler.compile(guide)
    trial = _Trial(compiler, guide)
    trial.write(compiled.deep_copy(), _NUM_TOKENS_OF_LONGEST)
    for first in trial.first_tokens(compiled.deep_copy()):
        trial.write(compiled.deep_copy(), _NUM_TOKENS, first)


class _Trial:
    def __init__(self, compiler: GuideCompiler, guide: Guide) -> None:
        self._guide, self._end_ids = guide, compiler.end_ids
        self._words: Words = np.zeros(compiler.num_words, dtype=np.uint32)
        self._rng = random.Random(0)

    def write(self, matcher: LLMatcher, num_tokens: int, first: int | None = None) -> None:
        """A random text, which ends only where it must. Raises InvalidRequest."""
        work = WorkLimit(MAX_WORK_S)
        token = first
        for _ in range(num_tokens):
            with work.measured():
                if token is not None and not matcher.consume_token(token):
                    raise not_usable(self._guide, first_line(matcher.get_error()))
                if matcher.is_stopped():
                    break
                self._find_tokens(matcher)
            if work.is_exceeded:
                raise not_usable(self._guide, "finding its tokens takes too long")
            if not self._words.any():
                return
            token = self._random_token()
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            raise not_usable(self._guide, first_line(matcher.get_error()))

    def first_tokens(self, matcher: LLMatcher) -> list[int]:
        """All of them, if there are few."""
        self._find_tokens(matcher)
        if np.count_nonzero(self._words) > _NUM_FIRSTS:
            return [self._random_token() for _ in range(_NUM_FIRSTS // 4)]
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return [int(token) for token in np.flatnonzero(bits)[:_NUM_FIRSTS]]

    def _find_tokens(self, matcher: LLMatcher) -> None:
        """Sets the bits of the tokens that may come next, without those that end the text."""
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if matcher.is_error():
            raise not_usable(self._guide, first_line(matcher.get_error()))
        for token in self._end_ids:
            self._words[token // 32] &= ~np.uint32(1 << token % 32)
        if not self._words.any() and not matcher.is_accepting():
            raise not_usable(self._guide, "no token of the model continues it")

    def _random_token(self) -> int:
        place = int(self._rng.choice(np.flatnonzero(self._words)))
        word = int(self._words[place])
        return 32 * place + self._rng.choice([bit for bit in range(32) if word >> bit & 1])
