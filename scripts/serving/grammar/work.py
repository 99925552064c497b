"""How much computing one text may need for its grammar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

FREE_S = 0.005
"""CPU time of a token that any grammar may use."""


class WorkLimit:
    """CPU time that the tokens of one text used beyond `FREE_S` each, up to `limit_s`.

    Other sequences of a batch wait for it. An ambiguous grammar needs more with every token.
    """

    def __init__(self, limit_s: float) -> None:
        self._left_s = limit_s

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Of this thread."""
        started = time.thread_time()
        yield
        self._left_s -= max(0.0, time.thread_time() - started - FREE_S)

    @property
    def is_exceeded(self) -> bool:
        return self._left_s < 0
