"""What each process of a frontend sent where, in memory that all of them see.

A burst of requests is decided within milliseconds by all processes. A message would come after
that, each would choose the same idle instance, and they would meet there. Memory is there at once:
whoever is about to decide reads what the others have written since.

Each process writes to a ring of its own, so there are no locks. An entry is valid when its check
fits the rest of it: one that is being written, or that its writer did not live to finish, is not.
Its number tells the entry that is expected from the one that was there a round before.
"""

from __future__ import annotations

import mmap
import os
from struct import Struct

from xxhash import xxh3_64_intdigest

from serving.kv_router.peers import RoutingDecision

CAPACITY = 4096
"""Entries that are kept of each process. Of more between two decisions of another, the oldest are
missed."""
_BODY = Struct("<QQdII")  # number from 1, registration, seconds, tokens, blocks
_CHECK = Struct("<Q")
_ENTRY = _BODY.size + _CHECK.size
_RING = CAPACITY * _ENTRY
_MOST = 2**32 - 1


def create(num_processes: int) -> int:
    """A file descriptor of such memory, for processes to inherit."""
    memory = os.memfd_create("frontend-sent")
    os.ftruncate(memory, num_processes * _RING)
    return memory


class DecisionLog:
    """One process' view. It goes on where a predecessor in its place stopped."""

    def __init__(self, memory: int, number: int, num_processes: int) -> None:
        """`memory` is what `create` returned."""
        self._memory = mmap.mmap(memory, num_processes * _RING)
        self._own = number * _RING
        self._next = 1 + self._newest(self._own)
        self._next_of_others = {
            ring: 1 + self._newest(ring)
            for ring in range(0, num_processes * _RING, _RING)
            if ring != self._own
        }

    def publish(self, decision: RoutingDecision) -> None:
        """Show a decision to the other processes."""
        tokens, blocks = min(decision.queued_tokens, _MOST), min(decision.blocks, _MOST)
        body = _BODY.pack(self._next, decision.registration, decision.decided_s, tokens, blocks)
        at = self._own + self._next % CAPACITY * _ENTRY
        self._memory[at : at + _ENTRY] = body + _CHECK.pack(xxh3_64_intdigest(body))
        self._next += 1

    def updates(self) -> list[RoutingDecision]:
        """Decisions of the other processes since the last call, the oldest first."""
        found: list[RoutingDecision] = []
        for ring, number in self._next_of_others.items():
            expected = number
            while (entry := self._read(ring, expected)) is not None and entry[0] >= expected:
                if entry[0] == expected:
                    found.append(RoutingDecision(*entry[1:]))
                    expected += 1
                else:  # overwritten meanwhile: on with the oldest that may still be there
                    expected = entry[0] - CAPACITY + 1
            if expected != number:
                self._next_of_others[ring] = expected
        if len(found) > 1:
            found.sort(key=lambda decision: decision.decided_s)
        return found

    def _read(self, ring: int, number: int) -> tuple[int, int, float, int, int] | None:
        """Where that number belongs, if it is whole: this one, or one a round or more apart."""
        at = ring + number % CAPACITY * _ENTRY
        entry = self._memory[at : at + _ENTRY]
        body = entry[: _BODY.size]
        found = _BODY.unpack(body)
        if not found[0] or entry[_BODY.size :] != _CHECK.pack(xxh3_64_intdigest(body)):
            return None
        return found

    def _newest(self, ring: int) -> int:
        entries = (self._read(ring, place) for place in range(CAPACITY))
        return max((entry[0] for entry in entries if entry is not None), default=0)
