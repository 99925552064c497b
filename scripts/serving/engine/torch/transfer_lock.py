"""A lock that several copies share, and that whoever takes the blocks away has alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TransferLock:
    """`with lock.copying()` in any number of threads, `with lock` in one of them.

    Who wants it alone goes first: it waits for copies under way, and no other begins meanwhile.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_copying = 0
        self._num_taking = 0  # that have it alone, or wait for it
        self._is_taken = False

    @contextmanager
    def copying(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_taking)
            self._num_copying += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_copying -= 1
                self._changed.notify_all()

    def __enter__(self) -> None:
        with self._changed:
            self._num_taking += 1
            self._changed.wait_for(lambda: not self._num_copying and not self._is_taken)
            self._is_taken = True

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._num_taking -= 1
            self._is_taken = False
            self._changed.notify_all()
