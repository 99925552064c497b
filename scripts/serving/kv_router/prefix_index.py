"""The prefix index: chained block hashes to the instances that hold those blocks.

    store, remove, replace    what instances report about themselves
    overlap                   leading blocks of a prompt that each instance holds

Answers are exact for the events that the index received: the longest run of leading blocks that an instance
holds in any tier, with no gap. Engines evict leaves first, but nothing here relies on it: a hole
that an engine made shows in the answer, and what lies behind it counts again once it is filled.

Blocks whose place is not known yet (a snapshot names hashes without their parents; an event may
follow a block that the index has evicted) are kept loose, by instance. A hash implies its whole
prefix, so the first prompt that contains such a block also shows its parent, and it moves into
the tree.

Memory is bounded: past `max_blocks`, loose blocks go first, since no prompt contained them, then the
least recently used runs, leaves first. The index forgets evicted blocks and is never wrong about
them: overlaps come out too small until the instance stores those blocks again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from serving.kv_router.block_tree import BlockTree, Run, leading
from serving.protocol import Tier

_BIT: dict[Tier, int] = {"device": 1, "host": 2}


class Overlap(NamedTuple):
    """Leading blocks of a prompt that each instance holds, if it holds the first at all.

    `on_host`: how many of those are in its host tier only; absent means none.
    """

    blocks: dict[str, int]
    on_host: dict[str, int]


class _Holder:
    __slots__ = ("loose", "num_blocks", "runs")

    def __init__(self) -> None:
        self.num_blocks = 0  # in the tree, each tier by itself
        self.runs: set[Run] = set()
        self.loose: dict[int, int] = {}  # block hash -> bits of the tiers that have it


class PrefixIndex:
    """Who holds which blocks. Knows nothing of sequence numbers, load or time."""

    def __init__(self, max_blocks: int | None = None, tree: BlockTree | None = None) -> None:
        """`tree` is empty; it may have other sizes than the default."""
        self._tree = BlockTree() if tree is None else tree
        self._holders: dict[str, _Holder] = {}
        self._num_loose = 0
        self._max_blocks = max_blocks
        self.evicted = 0
        """Blocks evicted so far because the index was full."""

    def __len__(self) -> int:
        """Distinct blocks in the tree, and loose ones of every instance."""
        return len(self._tree) + self._num_loose

    def num_blocks(self, instance_id: str) -> int:
        """Blocks known of `instance_id`; one held in both tiers counts twice."""
        holder = self._holders.get(instance_id)
        if holder is None:
            return 0
        return holder.num_blocks + sum(map(int.bit_count, holder.loose.values()))

    def blocks(self, instance_id: str, tier: Tier = "device") -> set[int]:
        """The blocks known of `instance_id` in a tier, for audits. Time is proportional to them."""
        holder = self._holders.get(instance_id)
        if holder is None:
            return set()
        found = {block for block, bits in holder.loose.items() if bits & _BIT[tier]}
        for run in holder.runs:
            found.update(run.held(_masks(run, tier).get(instance_id, 0)))
        return found

    # --- what instances report ---------------------------------------------------------------------

    def store(
        self,
        instance_id: str,
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        tier: Tier = "device",
    ) -> None:
        """`instance_id` now holds these consecutive blocks too; the first follows `parent_hash`
        (None: the root)."""
        holder = self._holder(instance_id)
        self._tree.tidy()
        run, at = None, 0
        if parent_hash is not None:
            run = self._tree.run_of.get(parent_hash)
            if run is None:
                self._keep_loose(holder, block_hashes, _BIT[tier])
                self._make_room()
                return
            at = run.index(parent_hash) + 1
        for piece, first, count in self._tree.place(block_hashes, run, at, instance_id):
            self._hold(instance_id, holder, piece, (1 << count) - 1 << first, tier)
        if holder.loose:
            self._settle(instance_id, holder, block_hashes)
        self._make_room()

    def remove(self, instance_id: str, block_hashes: Sequence[int], tier: Tier = "device") -> None:
        """`instance_id` holds these no longer in that tier. Blocks it never held are ignored."""
        holder = self._holders.get(instance_id)
        if holder is None:
            return
        get, touched = self._tree.run_of.get, set()
        start = 0
        while start < len(block_hashes):
            run = get(block_hashes[start])
            mask = _masks(run, tier).get(instance_id, 0) if run is not None else 0
            gone, count = _held_by(mask, run, block_hashes, start) if run is not None else (0, 1)
            if run is not None and gone:
                touched.add(run)
                holder.num_blocks -= count
                if rest := mask ^ gone:
                    _masks(run, tier)[instance_id] = rest
                else:
                    del _masks(run, tier)[instance_id]
                    if not run.holds(instance_id):
                        holder.runs.discard(run)
            else:
                self._drop_loose(holder, block_hashes[start], _BIT[tier])
            start += count
        for run in touched:
            self._tree.trim(run)

    def clear(self, instance_id: str) -> None:
        """`instance_id` holds nothing any more."""
        self.remove_instance(instance_id)

    def replace(
        self, instance_id: str, block_hashes: Iterable[int], on_host: Iterable[int] = ()
    ) -> None:
        """`instance_id` holds exactly these. What is known to be there keeps its place."""
        now: dict[Tier, Collection[int]] = {"device": set(block_hashes), "host": set(on_host)}
        holder = self._holder(instance_id)
        for tier, hashes in now.items():
            before = self.blocks(instance_id, tier)
            self.remove(instance_id, list(before.difference(hashes)), tier)
            unplaced = [block_hash for block_hash in hashes if block_hash not in before]
            self._keep_loose(holder, unplaced, _BIT[tier])
        self._make_room()

    def remove_instance(self, instance_id: str) -> None:
        """Forget `instance_id`, in time proportional to its runs: blocks that only it held go with
        later calls of `store`, some at a time."""
        holder = self._holders.pop(instance_id, None)
        if holder is None:
            return
        self._num_loose -= len(holder.loose)
        for run in holder.runs:
            run.device.pop(instance_id, None)
            run.host.pop(instance_id, None)
        self._tree.abandon(holder.runs)

    # --- look-up -----------------------------------------------------------------------

    def overlap(self, block_hashes: Sequence[int]) -> Overlap:
        """Leading blocks held by each instance. `block_hashes` is the chain of a prompt.

        Counts as a use of what was found, and may put loose blocks in their place.
        """
        while True:
            found = self._walk(block_hashes)
            if not self._num_loose or not self._adopt(block_hashes, found.blocks):
                return found

    def _walk(self, chain: Sequence[int]) -> Overlap:
        blocks: dict[str, int] = {}
        on_host: dict[str, int] = {}
        for run, start, length in self._tree.path(chain):
            end, all_of_it, goes_on = start + length, (1 << length) - 1, False
            for instance_id, mask in run.device.items():
                if start and blocks.get(instance_id) != start:
                    continue
                if run.host:
                    mask |= run.host.get(instance_id, 0)
                if mask & all_of_it == all_of_it:
                    blocks[instance_id] = end
                    goes_on = True
                elif num_held := leading(mask):
                    blocks[instance_id] = start + num_held
            for instance_id, mask in run.host.items():
                on_device = run.device.get(instance_id, 0)
                if not on_device:
                    if start and blocks.get(instance_id) != start:
                        continue
                    if num_held := leading(mask & all_of_it):
                        blocks[instance_id] = start + num_held
                        goes_on = goes_on or num_held == length
                num_held = blocks.get(instance_id, 0) - start
                if num_held > 0 and (only := mask & ~on_device & (1 << num_held) - 1):
                    on_host[instance_id] = on_host.get(instance_id, 0) + only.bit_count()
            if not goes_on:
                break
        return Overlap(blocks, on_host)

    # --- loose blocks ---------------------------------------------------------------------------

    def _adopt(self, chain: Sequence[int], found: dict[str, int]) -> bool:
        """Put loose blocks that continue what was found into the tree; True if there were any."""
        adopted = False
        for instance_id, holder in self._holders.items():
            loose = holder.loose
            start = end = found.get(instance_id, 0)
            while end < len(chain) and chain[end] in loose:
                end += 1
            if end > start:
                run = self._tree.run_of[chain[start - 1]] if start else None
                at = run.index(chain[start - 1]) + 1 if run else 0
                hashes = chain[start:end]
                self._tree.place(hashes, run, at, instance_id)
                self._settle(instance_id, holder, hashes)
                adopted = True
        return adopted

    def _settle(self, instance_id: str, holder: _Holder, block_hashes: Sequence[int]) -> None:
        """What the instance holds of these, known to be in the tree, is loose no longer."""
        for block_hash in block_hashes:
            bits = holder.loose.pop(block_hash, 0)
            if bits:
                self._num_loose -= 1
                run = self._tree.run_of[block_hash]
                mask = 1 << run.index(block_hash)
                for tier, bit in _BIT.items():
                    if bits & bit:
                        self._hold(instance_id, holder, run, mask, tier)

    def _keep_loose(self, holder: _Holder, block_hashes: Iterable[int], bit: int) -> None:
        loose = holder.loose
        before = len(loose)
        for block_hash in block_hashes:
            loose[block_hash] = loose.get(block_hash, 0) | bit
        self._num_loose += len(loose) - before

    def _drop_loose(self, holder: _Holder, block_hash: int, bit: int) -> None:
        bits = holder.loose.get(block_hash, 0)
        if bits & bit:
            if bits ^ bit:
                holder.loose[block_hash] = bits ^ bit
            else:
                del holder.loose[block_hash]
                self._num_loose -= 1

    # --- holders and eviction ------------------------------------------------------------------

    def _holder(self, instance_id: str) -> _Holder:
        holder = self._holders.get(instance_id)
        if holder is None:
            holder = self._holders[instance_id] = _Holder()
        return holder

    @staticmethod
    def _hold(instance_id: str, holder: _Holder, run: Run, mask: int, tier: Tier) -> None:
        masks = _masks(run, tier)
        before = masks.get(instance_id, 0)
        now = before | mask
        if now != before:
            masks[instance_id] = now
            holder.num_blocks += (now ^ before).bit_count()
            holder.runs.add(run)

    def _make_room(self) -> None:
        if self._max_blocks is None:
            return
        while (excess := len(self) - self._max_blocks) > 0:
            if self._num_loose:
                holder = max(self._holders.values(), key=lambda holder: len(holder.loose))
                # Many at once: each time the search begins at what was deleted before.
                num_evicted = max(excess, len(holder.loose) // 8)
                for block_hash in list(islice(holder.loose, num_evicted)):
                    del holder.loose[block_hash]
                    self._num_loose -= 1
                    self.evicted += 1
            else:
                self._evict(self._tree.coldest())

    def _evict(self, run: Run) -> None:
        self.evicted += len(run.hashes)
        for masks in (run.device, run.host):
            for instance_id, mask in masks.items():
                holder = self._holders[instance_id]
                holder.num_blocks -= mask.bit_count()
                holder.runs.discard(run)
            masks.clear()
        self._tree.trim(run)


def _held_by(mask: int, run: Run, hashes: Sequence[int], start: int) -> tuple[int, int]:
    """The bits of `mask` that mean `hashes[start:]`, as far as those follow each other backwards
    through the end of what is held, as they do when leaves go first; else of the first alone."""
    last = mask.bit_length() - 1
    if last >= 0 and run.hashes[last] == hashes[start]:
        count = min(last + 1, len(hashes) - start)
        first = last + 1 - count
        same = run.hashes[first : last + 1].tolist()[::-1] == hashes[start : start + count]
        if same and mask >> first == (1 << count) - 1:
            return mask >> first << first, count
        return 1 << last, 1
    return mask & 1 << run.index(hashes[start]), 1


def _masks(run: Run, tier: Tier) -> dict[str, int]:
    return run.device if tier == "device" else run.host
