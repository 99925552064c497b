"""The prefix index: chained block hashes to the instances that hold those blocks.

A block hash names a block *and* everything before it, so no tree is needed: one dictionary from
hash to a bit mask of holders answers every prefix question, and because holders only drop out
as a prefix grows, the place where each one does is found by bisection instead of a walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Who holds which blocks. Knows nothing of sequence numbers, load or time.

    Exactness. An instance that holds a block normally holds all blocks before it: engines evict
    leaves first. As long as that is so, `overlap` is exact. When an instance evicted an inner
    block and kept a later one, the answer `n` still means that block 0 and block n-1 are held
    and block n is not, but a hole before n-1 may go unseen. The answer is then too high until the
    hole is filled, which the first request routed there does. The bisection looks
    at about log2(n) blocks; looking at all of them costs more than twice the time.

    Memory: a dictionary entry and an entry in the holder's set, about 110 bytes a block; masks
    are shared by blocks with the same holders.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # block hash -> bit mask of slots
        self._held: dict[str, set[int]] = {}  # instance -> its block hashes, for cheap removal
        self._slots: dict[str, int] = {}
        self._names: list[str] = []  # slot -> instance; a freed slot keeps its last name
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        """Distinct blocks held anywhere."""
        return len(self._holders)

    def num_blocks(self, instance_id: str) -> int:
        """Blocks that `instance_id` holds."""
        return len(self._held.get(instance_id, ()))

    def store(self, instance_id: str, block_hashes: Sequence[int]) -> None:
        """`instance_id` now holds these blocks as well."""
        bit = self._bit(instance_id)
        self._held[instance_id].update(block_hashes)
        holders = self._holders
        before, after = 0, bit  # Blocks of one event mostly share their holders: share the mask.
        for block_hash in block_hashes:
            mask = holders.get(block_hash, 0)
            if mask != before:
                before, after = mask, mask | bit
            holders[block_hash] = after

    def remove(self, instance_id: str, block_hashes: Iterable[int]) -> None:
        """`instance_id` holds these no longer. Blocks it never held are ignored."""
        held = self._held.get(instance_id)
        if held is None:
            return
        gone = held.intersection(block_hashes)
        held -= gone
        self._clear_bits(self._bit(instance_id), gone)

    def clear(self, instance_id: str) -> None:
        """`instance_id` holds nothing any more."""
        held = self._held.get(instance_id)
        if held:
            self._held[instance_id] = set()
            self._clear_bits(self._bit(instance_id), held)

    def replace(self, instance_id: str, block_hashes: Iterable[int]) -> None:
        """`instance_id` holds exactly these. Touches only what differs."""
        now = set(block_hashes)
        held = self._held.get(instance_id, set())
        self.remove(instance_id, held - now)
        self.store(instance_id, list(now - held))

    def remove_instance(self, instance_id: str) -> None:
        """Forget `instance_id`. Time is proportional to the blocks it held."""
        if instance_id in self._slots:
            self.clear(instance_id)
            del self._held[instance_id]
            self._free_slots.append(self._slots.pop(instance_id))

    def overlap(self, block_hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks held, for each instance that holds at least the first.

        `block_hashes` is the chain of a prompt. See the class for exactness.
        """
        found: dict[str, int] = {}
        if not block_hashes:
            return found
        get = self._holders.get
        num_blocks = len(block_hashes)
        at_end = get(block_hashes[-1], 0)
        live = get(block_hashes[0], 0)  # holders of everything up to and including block `first`
        first = 0
        while live:
            if live & at_end == live:
                still_live, end = 0, num_blocks
            else:
                end = num_blocks - 1
                while end - first > 1:
                    middle = (first + end) >> 1
                    if get(block_hashes[middle], 0) & live == live:
                        first = middle
                    else:
                        end = middle
                still_live = get(block_hashes[end], 0) & live
            dropped = live ^ still_live
            while dropped:
                bit = dropped & -dropped
                found[self._names[bit.bit_length() - 1]] = end
                dropped ^= bit
            live, first = still_live, end
        return found

    def _bit(self, instance_id: str) -> int:
        slot = self._slots.get(instance_id)
        if slot is None:
            if self._free_slots:
                slot = self._free_slots.pop()
                self._names[slot] = instance_id
            else:
                slot = len(self._names)
                self._names.append(instance_id)
            self._slots[instance_id] = slot
            self._held[instance_id] = set()
        return 1 << slot

    def _clear_bits(self, bit: int, block_hashes: Iterable[int]) -> None:
        holders = self._holders
        for block_hash in block_hashes:
            rest = holders[block_hash] ^ bit
            if rest:
                holders[block_hash] = rest
            else:
                del holders[block_hash]
