"""The routing decisions of all processes of a frontend, in memory that they share.

All processes decide the requests of one burst within milliseconds. Messages would arrive after
that: each process would choose the same idle instance, and the requests would queue there. Shared
memory has no such delay. A process reads the others' new decisions right before it decides.

Each process writes to its own ring, so there are no locks. An entry is valid if its checksum fits;
that excludes entries that are half written, even for ever because their writer died. The number in
an entry distinguishes it from the entry of an earlier round.
"""

from __future__ import annotations

import mmap
import os
from struct import Struct

from xxhash import xxh3_64_intdigest

from serving.kv_router.peers import RoutingDecision

CAPACITY = 4096
"""Entries in each ring. A process that reads less often than that misses the oldest."""
_BODY = Struct("<QQdII")  # number from 1, registration, seconds, tokens, blocks
_CHECK = Struct("<Q")
_ENTRY = _BODY.size + _CHECK.size
_RING = CAPACITY * _ENTRY
_MOST = 2**32 - 1


def create(num_processes: int, num_models: int = 1) -> int:
    """A file descriptor of new shared memory, which the processes inherit. Each model has a log."""
    memory = os.memfd_create("frontend-decisions")
    os.ftruncate(memory, num_processes * num_models * _RING)
    return memory


class DecisionLog:
    """One process' end of the log. It continues where its predecessor in the same slot stopped."""

    def __init__(self, memory: int, number: int, num_processes: int, model: int = 0) -> None:
        """`memory` comes from `create`; `number` is that of the process slot, `model` the place of
        the model among those that are served."""
        first = model * num_processes * _RING
        self._memory = mmap.mmap(memory, first + num_processes * _RING)
        self._own = first + number * _RING
        self._next = 1 + self._newest(self._own)
        self._next_of_peers = {
            ring: 1 + self._newest(ring)
            for ring in range(first, first + num_processes * _RING, _RING)
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
        for ring, number in self._next_of_peers.items():
            expected = number
            while (entry := self._read(ring, expected)) is not None and entry[0] >= expected:
                if entry[0] == expected:
                    found.append(RoutingDecision(*entry[1:]))
                    expected += 1
                else:  # Overwritten: continue with the oldest entry that may still be there.
                    expected = entry[0] - CAPACITY + 1
            if expected != number:
                self._next_of_peers[ring] = expected
        if len(found) > 1:
            found.sort(key=lambda decision: decision.decided_s)
        return found

    def _read(self, ring: int, number: int) -> tuple[int, int, float, int, int] | None:
        """The valid entry where `number` belongs. It may be one of another round."""
        at = ring + number % CAPACITY * _ENTRY
        entry = self._memory[at : at + _ENTRY]
        body = entry[: _BODY.size]
        found = _BODY.unpack(body)
        if not found[0] or entry[_BODY.size :] != _CHECK.pack(xxh3_64_intdigest(body)):
            return None
        return found

    def _newest(self, ring: int) -> int:
        entries = (self._read(ring, index) for index in range(CAPACITY))
        return max((entry[0] for entry in entries if entry is not None), default=0)
