"""The KV blocks of one engine: which are held, and which are kept for prefix hits. Knows no tensors.

A block is free (no content of value), cached (unreferenced, holds a hash, may be evicted), or held
(referenced by sequences; it may hold a hash as well). A hash belongs to at most one block: when a
sequence computes a block that is stored already, it moves over to the stored block. Block 0 is
never handed out: it stays zero and pads block tables.

Evicted blocks may continue in a host tier, from which a later claim brings them back. A block is
released after the blocks that follow it, so it is evicted after them. Thus the device holds the
beginning of a prompt, and only the host tier may hold what comes after.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from serving.engine.core.host_tier import Copies, HostTier
from serving.protocol import BlocksRemoved, BlocksStored, KvEvent


class BlockPool:
    """Blocks `1..num_blocks`. Not thread-safe: its owner locks."""

    def __init__(self, num_blocks: int, host: HostTier | None = None) -> None:
        self.num_blocks = num_blocks
        self.host = HostTier() if host is None else host
        self._refs = [0] * (num_blocks + 1)
        self._hash: list[int | None] = [None] * (num_blocks + 1)
        self._parent: list[int | None] = [None] * (num_blocks + 1)  # where there is a hash
        self._by_hash: dict[int, int] = {}
        self._free = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._events: list[KvEvent] = []

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def match(self, hashes: Sequence[int]) -> list[int]:
        """The blocks of the longest prefix of `hashes` on the device. Does not hold them yet."""
        blocks = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_stored(self, hashes: Sequence[int]) -> int:
        """Blocks in the longest prefix of `hashes` that `claim` would find, in either tier."""
        num_matched = len(self.match(hashes))
        return num_matched + len(self._only_on_host(hashes[num_matched:]))

    def fits(self, matched: Sequence[int], num_new: int) -> bool:
        """Whether `num_new` blocks remain once the matched ones are held."""
        revived = sum(self._refs[block] == 0 for block in matched)
        return self.num_available - revived >= num_new

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks found by `match`."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def claim(
        self, matched: Sequence[int], hashes: Sequence[int], num_new: int
    ) -> tuple[list[int], int]:
        """Hold the blocks `matched` by `hashes`, and allocate `num_new` to follow them.

        Blocks of the hashes that follow, if the host tier has them, are copied to the first of the
        new blocks: they count as stored at once, and steps after the copies may use them. Returns
        all blocks, and how many of them are stored.
        """
        self.hold(matched)
        first = len(matched)
        found = self._only_on_host(hashes[first:])[:num_new]
        self.host.pin(found)  # or the allocation might evict them
        blocks = [*matched, *self.allocate(num_new)]
        parent = hashes[first - 1] if first else None
        for block, value in zip(blocks[first:], found, strict=False):
            self.host.onload(value, block)
            self._remember(block, value, parent)
            parent = value
        self._emit_stored(hashes[first - 1] if first else None, found)
        return blocks, first + len(found)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, evicting the least recently used if needed."""
        assert count <= self.num_available, "the scheduler asks before it allocates"
        blocks = []
        evicted = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                evicted.append(self._evict(block))
            self._refs[block] = 1
            blocks.append(block)
        if evicted:
            self._events += self.host.take_events()
            self._events.append(BlocksRemoved(evicted))
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each. Stored blocks stay for prefix hits until evicted."""
        # Leaves first, so that eviction takes them first and the shorter prefix stays reusable.
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def store(
        self,
        blocks: Sequence[int],
        hashes: Sequence[int],
        parent: int | None,
        *,
        are_read: bool = False,
    ) -> list[int]:
        """Make held, full blocks available for prefix hits; returns the blocks to use from now on.

        A block whose content is stored already is given back, and the stored one is held instead.
        Blocks that `are_read` by a step under way are kept, because a transfer that is given the
        stored block would not wait for that step.
        """
        kept = []
        run: list[int] = []
        for block, value in zip(blocks, hashes, strict=True):
            stored = self._by_hash.get(value)
            if stored is None:
                stored = block
                self._remember(block, value, run[-1] if run else parent)
                self.host.demote(value)
                run.append(value)
            elif are_read or self.host.is_arriving(stored):
                # Transfers may read what a sequence has computed, and the stored block has no content yet.
                self._emit_stored(parent, run)
                run, parent, stored = [], value, block
            else:
                self.hold([stored])
                self.release([block])
                self._emit_stored(parent, run)
                run, parent = [], value
            kept.append(stored)
        self._emit_stored(parent, run)
        return kept

    def take_events(self) -> list[KvEvent]:
        """Changes of the cache since the last call, in order."""
        events, self._events = self._events, []
        return events

    def num_arrived(self, blocks: Sequence[int]) -> int:
        """Leading blocks whose content is complete for every reader, not only for the coming steps."""
        arriving = (i for i, block in enumerate(blocks) if self.host.is_arriving(block))
        return next(arriving, len(blocks))

    def take_copies(self) -> Copies:
        """The copies between the tiers that the coming step must make before it computes."""
        return self.host.take_copies()

    def copied(self, copies: Copies) -> None:
        """The copies of a step were made."""
        self.host.copied(copies, self._by_hash)

    def stored_hashes(self) -> set[int]:
        """Hashes of the blocks on the device."""
        return set(self._by_hash)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Every block is free, cached or held, and references add up to what `holders` list."""
        expected = Counter(block for blocks in holders for block in blocks)
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(1, self.num_blocks + 1):
            refs = self._refs[block]
            assert refs == expected[block], f"block {block}: {refs} refs, {expected[block]} holders"
            homes = (block in free) + (block in cached) + (refs > 0)
            assert homes == 1, f"block {block} is in {homes} places"
            assert block not in free or self._hash[block] is None, f"free block {block} has a hash"
        by_hash = {h: block for block, h in enumerate(self._hash) if h is not None}
        assert by_hash == self._by_hash, "hashes and blocks disagree"
        assert cached <= set(by_hash.values()), "a cached block has no hash"
        assert 0 not in expected, "block 0 was handed out"
        self.host.check_integrity(self._hash)

    def _only_on_host(self, hashes: Sequence[int]) -> list[int]:
        """The longest prefix of `hashes` that only the host tier has."""
        found = []
        for value in hashes:
            if value not in self.host or value in self._by_hash:
                break
            found.append(value)
        return found

    def _remember(self, block: int, value: int, parent: int | None) -> None:
        self._hash[block], self._parent[block] = value, parent
        self._by_hash[value] = block

    def _evict(self, block: int) -> int:
        value = self._hash[block]
        assert value is not None
        self.host.take_over(block, value, self._parent[block])
        self._hash[block] = None
        del self._by_hash[value]
        return value

    def _emit_stored(self, parent: int | None, run: list[int]) -> None:
        if run:
            self._events.append(BlocksStored(parent, run))
