"""Whether a guide can be used: it is compiled, and some texts of it are written.

Some limits of llguidance show only while a text grows. A guide that meets them early is refused.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serving.grammar.compiler import GuideCompiler, first_line, not_usable
from serving.protocol import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_MASK_S = 0.1
"""CPU time for the next token. The engine allows more, so that what passes here passes there."""
_NUM_TEXTS = 6
_NUM_TOKENS = 24
_MAX_OPTIONS = 16


def try_guide(compiler: GuideCompiler, guide: Guide) -> None:
    """Raises InvalidRequest."""
    compiled = compiler.compile(guide)
    trial = _Trial(compiler, guide)
    options = trial.options(compiled.deep_copy())
    rng = random.Random(0)
    firsts = options if len(options) <= _MAX_OPTIONS else rng.sample(options, _NUM_TEXTS)
    for first in firsts:
        trial.write(compiled.deep_copy(), first, rng)
    for _ in range(_NUM_TEXTS - len(firsts)):
        trial.write(compiled.deep_copy(), rng.choice(firsts), rng)


class _Trial:
    def __init__(self, compiler: GuideCompiler, guide: Guide) -> None:
        self._guide, self._end_ids = guide, set(compiler.end_ids)
        self._words: npt.NDArray[np.uint32] = np.zeros(compiler.num_words, dtype=np.uint32)

    def write(self, matcher: LLMatcher, first: int, rng: random.Random) -> None:
        """A random text that begins with the token `first`."""
        token = first
        for _ in range(_NUM_TOKENS):
            if not matcher.consume_token(token):
                raise not_usable(self._guide, first_line(matcher.get_error()))
            if matcher.is_stopped():
                return
            options = self.options(matcher)
            if not options:
                return
            token = rng.choice(options)

    def options(self, matcher: LLMatcher) -> list[int]:
        """Tokens that may come next; none where the text can only end. Raises InvalidRequest."""
        started = time.process_time()
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        took_s = time.process_time() - started
        if matcher.is_error():
            raise not_usable(self._guide, first_line(matcher.get_error()))
        if took_s > MAX_MASK_S:
            raise not_usable(self._guide, f"finding the next token takes {took_s:.2g} s")
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        options = [int(token) for token in np.flatnonzero(bits) if token not in self._end_ids]
        if not options and not matcher.is_accepting():
            raise not_usable(self._guide, "no token of the model continues it")
        return options
