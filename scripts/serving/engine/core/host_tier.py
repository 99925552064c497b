"""Evicted KV blocks in host memory: the content of each host block, and the copies to be made.

A block enters when the device evicts it and leaves when room is needed. Blocks that the device
holds as well leave first, then the least recently evicted. A host block that a copy still reads or
writes is pinned, so it is not reused. Knows no tensors: an engine carries out the copies (`Copies`).
Not thread-safe, like the pool.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

from serving.protocol import BlocksRemoved, BlocksStored, KvEvent


class Copies(NamedTuple):
    """Copies to make before a step computes: all `offloads`, then all `onloads`.

    `offloads` are (device block, host block), `onloads` (host block, device block). No block is
    written twice by either list. An offload reads a device block before an onload or the step
    writes to it; an onload may read what an offload of the same step wrote.
    """

    ticket: int
    offloads: list[tuple[int, int]]
    onloads: list[tuple[int, int]]
    pinned: list[int]  # the hashes of all of them

    def __bool__(self) -> bool:
        return bool(self.pinned)


class HostTier:
    """Host blocks `0..num_blocks - 1`. With `num_blocks` 0 it takes and holds nothing."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_offloaded = self.num_onloaded = 0  # blocks, in all
        self._block_of: dict[int, int] = {}  # hash -> host block
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # unpinned hashes, first to go first
        self._pins: Counter[int] = Counter()
        self._offloads: list[tuple[int, int]] = []  # (device block, hash), until a plan has them
        self._onloads: dict[int, int] = {}  # device block -> hash, likewise
        self._under_way: deque[Copies] = deque()
        self._last_ticket = 0  # of the latest copies
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()  # by the ticket to wait for
        self._stored: list[tuple[int | None, int]] = []  # (parent, hash), not reported yet
        self._removed: list[int] = []

    def __contains__(self, value: int) -> bool:
        return value in self._block_of

    def __len__(self) -> int:
        return len(self._block_of)

    # --- for the pool --------------------------------------------------------------------

    def take_over(self, block: int, value: int, parent: int | None) -> None:
        """The device evicts `block`, whose hash is `value`: keep its content if there is room."""
        if self._onloads.pop(block, None) is not None:  # evicted before it was even copied
            self._unpin(value)
        if value in self._block_of:
            self._touch(value)
            return
        host_block = self._take_host_block()
        if host_block is None:
            return
        self._block_of[value] = host_block
        self.pin([value])
        self._offloads.append((block, value))
        self._stored.append((parent, value))

    def pin(self, values: Iterable[int]) -> None:
        """Do not evict these until a copy that `onload` asks for is done."""
        for value in values:
            self._idle.pop(value, None)
            self._pins[value] += 1

    def onload(self, value: int, block: int) -> None:
        """Copy a pinned block to device block `block` with the next copies."""
        self._onloads[block] = value

    def demote(self, value: int) -> None:
        """The device holds it as well now, so it is the first to leave."""
        if value in self._idle:
            self._idle.move_to_end(value, last=False)

    def is_arriving(self, block: int) -> bool:
        """Whether a copy to this device block is still to be made."""
        return block in self._onloads or any(
            block == target for plan in self._under_way for _, target in plan.onloads
        )

    def take_events(self) -> list[KvEvent]:
        """Changes since the last call. Every block stored is still on the device."""
        events: list[KvEvent] = []
        if self._removed:
            events.append(BlocksRemoved(self._removed, "host"))
        run: list[int] = []
        first_parent: int | None = None
        for parent, value in reversed(self._stored):  # leaves were evicted first
            if not run or parent != run[-1]:
                run, first_parent = [], parent
                events.append(BlocksStored(first_parent, run, "host"))
            run.append(value)
        self._stored, self._removed = [], []
        return events

    # --- copies --------------------------------------------------------------------------------

    def when_copied(self, callback: Callable[[], None]) -> None:
        """Call back when all copies planned up to now are made: at once if there are none.

        Until then only steps may write to device blocks that were evicted: their content may
        not have been read yet.
        """
        is_planned = bool(self._offloads or self._onloads)
        if is_planned or self._under_way:
            self._waiting.append((self._last_ticket + is_planned, callback))
        else:
            callback()

    def take_copies(self) -> Copies:
        """The copies that the coming step must make first. Unless empty, give them to `copied`."""
        offloads = [(block, self._block_of[value]) for block, value in self._offloads]
        onloads = [(self._block_of[value], block) for block, value in self._onloads.items()]
        pinned = [value for _, value in self._offloads] + list(self._onloads.values())
        copies = Copies(self._last_ticket + 1, offloads, onloads, pinned)
        if copies:
            self._last_ticket = copies.ticket
            self._under_way.append(copies)
            self.num_offloaded += len(offloads)
            self.num_onloaded += len(onloads)
            self._offloads, self._onloads = [], {}
        return copies

    def copied(self, copies: Copies, on_device: Container[int]) -> None:
        """These copies were made, in the order of `take_copies`. `on_device`: hashes stored there."""
        if not copies:
            return
        done = self._under_way.popleft()
        assert done is copies, "copies are made in order"
        for value in copies.pinned:
            self._unpin(value)
            if value in on_device:
                self.demote(value)
        while self._waiting and self._waiting[0][0] <= copies.ticket:
            self._waiting.popleft()[1]()

    # --- for tests and status ------------------------------------------------------------------

    def stored_hashes(self) -> set[int]:
        return set(self._block_of)

    def check_integrity(self, hash_of: Sequence[int | None]) -> None:
        """Every host block is free or holds one hash, and pins add up to the copies to be made.

        `hash_of` has the hash of each device block.
        """
        used = list(self._block_of.values())
        assert sorted(used + self._free) == list(range(self.num_blocks)), "host blocks overlap"
        planned = [value for _, value in self._offloads] + list(self._onloads.values())
        pins = Counter(planned + [value for plan in self._under_way for value in plan.pinned])
        assert pins == self._pins, "pins and copies disagree"
        assert set(self._idle) == self._block_of.keys() - pins.keys(), "a block is idle and pinned"
        assert pins.keys() <= self._block_of.keys(), "a copy of a block that is not there"
        sources = [block for block, _ in self._offloads]
        assert len(set(sources)) == len(sources), "a block is offloaded twice"
        for block, value in self._onloads.items():
            assert hash_of[block] == value, f"block {block} is not what is copied to it"
        assert not self._stored, "stored blocks were not reported"
        assert not self._removed, "removed blocks were not reported"

    # --- inside --------------------------------------------------------------------------------

    def _take_host_block(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        value, _ = self._idle.popitem(last=False)
        self._removed.append(value)
        return self._block_of.pop(value)

    def _touch(self, value: int) -> None:
        if value in self._idle:
            self._idle.move_to_end(value)

    def _unpin(self, value: int) -> None:
        self._pins[value] -= 1
        if not self._pins[value]:
            del self._pins[value]
            self._idle[value] = None
