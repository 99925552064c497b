"""Chains of blocks, and who holds which of them: the structure under the prefix index.

A block hash names its whole prefix, so equal hashes are one place in one tree. Blocks that follow
each other lie in one `Run`; a run starts behind some block of another one, or at the root. What
an instance holds of a run is a bit mask, bit 0 the first block, so "how much of it without a gap"
is a property of one integer, whatever order blocks come and go in.

The tree is closed under prefixes: a block stays as long as anybody holds it or anything follows
it. Therefore a look-up needs one dictionary probe per run and a bisection in the last one,
instead of a walk over blocks. That is a fact about this structure; engines need not keep to it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

RUN_BLOCKS = 512
"""Longest run: bounds what finding one block in its run costs, and what one eviction takes."""
AT_ONCE = 8
"""Runs of a lost instance that are cleared away on the spot. Freeing all can take 10 ms or more."""


class Run:
    """Consecutive blocks. `device` and `host` are the blocks that each instance holds, by tier.

    `hashes` is an array because a look-up in a large index costs what it misses in the processor's
    caches, and the numbers of a list lie all over memory. `parent` and `at`: the run it follows, and how many of that run's blocks come before it.
    `forks` counts the runs that follow this one, by their `at`.
    """

    __slots__ = ("at", "device", "forks", "hashes", "host", "parent")

    def __init__(self, parent: Run | None, at: int, hashes: list[int]) -> None:
        self.parent, self.at, self.hashes = parent, at, array("Q", hashes)
        self.device: dict[str, int] = {}
        self.host: dict[str, int] = {}
        self.forks: dict[int, int] = {}

    def index(self, block_hash: int) -> int:
        """Place of one of the run's blocks."""
        hashes = self.hashes
        return len(hashes) - 1 if hashes[-1] == block_hash else hashes.index(block_hash)

    def shared(self, chain: Sequence[int], start: int) -> int:
        """How many of the run's blocks follow each other in `chain` from `start`; the first does,
        the last does not."""
        hashes = self.hashes
        low, high = 0, min(len(hashes), len(chain) - start) - 1
        while high - low > 1:
            middle = (low + high) >> 1
            if chain[start + middle] == hashes[middle]:
                low = middle
            else:
                high = middle
        return low + 1

    def holds(self, instance_id: str) -> bool:
        return instance_id in self.device or instance_id in self.host

    def held(self, mask: int) -> list[int]:
        """The blocks of a mask."""
        hashes = self.hashes
        if mask == (1 << len(hashes)) - 1:
            return hashes.tolist()
        return [hashes[place] for place in _bits(mask)]

    def is_private(self, instance_id: str) -> bool:
        """Nobody else holds anything here, and this instance something."""
        device, host = self.device, self.host
        return (
            len(device) == 1
            and instance_id in device
            and (not host or host.keys() == device.keys())
        )

    def num_needed(self) -> int:
        """Leading blocks that somebody holds or something follows."""
        masks = [*self.device.values(), *self.host.values()]
        return max([*(mask.bit_length() for mask in masks), *self.forks], default=0)


class BlockTree:
    """All runs, and where each block lies. Does not know what an instance is."""

    def __init__(self, run_blocks: int = RUN_BLOCKS, at_once: int = AT_ONCE) -> None:
        self._run_blocks, self._at_once = run_blocks, at_once
        self.run_of: dict[int, Run] = {}
        self._by_use: OrderedDict[Run, None] = OrderedDict()  # the one used longest ago first
        self._to_trim: list[Run] = []

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self.run_of)

    def path(self, chain: Sequence[int]) -> list[tuple[Run, int, int]]:
        """The runs along `chain`, from the root, with where in the chain each starts and how many
        of its blocks the chain shares. Counts as a use of them all."""
        get, start, size = self.run_of.get, 0, len(chain)
        path: list[tuple[Run, int, int]] = []
        run = get(chain[0]) if chain else None
        while run is not None and run.hashes[0] == chain[start]:
            hashes, following = run.hashes, None
            length = len(hashes) if len(hashes) < size - start else size - start
            if chain[start + length - 1] != hashes[length - 1]:
                # It leaves the run, mostly for one of those that follow: fewer steps, and sure.
                for at in run.forks if len(run.forks) < 4 else ():
                    if at < length:
                        following = get(chain[start + at])
                        if following is not None and following.parent is run and following.at == at:
                            length = at
                            break
                else:
                    length = run.shared(chain, start)
                    following = None
            path.append((run, start, length))
            start += length
            if start >= size:
                break
            run = following or get(chain[start])
        for run, _, _ in reversed(path):  # What comes before others is used whenever they are.
            self._by_use.move_to_end(run)
        return path

    def place(
        self, hashes: Sequence[int], run: Run | None, at: int, owner: str
    ) -> list[tuple[Run, int, int]]:
        """Where consecutive blocks lie that follow the first `at` blocks of `run` (None: the
        root): run, first place in it, number. New ones are added; somebody must hold them, or
        `trim` the runs.

        A run that only `owner` has anything of is made longer; else a new one starts. What all
        share and what one has alone should not be one run, since they cool down apart.
        """
        pieces: list[tuple[Run, int, int]] = []
        get, start, size = self.run_of.get, 0, len(hashes)
        while start < size:
            known = get(hashes[start])
            if known is None:  # Then so is all that follows.
                run, first = self._add(run, at, hashes[start:], owner)
                count = min(len(run.hashes) - first, size - start)
            else:
                if known is run and at < len(run.hashes) and run.hashes[at] == hashes[start]:
                    first = at
                else:
                    run, first = known, known.index(hashes[start])
                self._by_use.move_to_end(run)
                count = min(len(run.hashes) - first, size - start)
                there = run.hashes[first : first + count].tolist()
                if there != hashes[start : start + count]:
                    count = next(n for n in range(count) if there[n] != hashes[start + n])
            pieces.append((run, first, count))
            start, at = start + count, first + count
        return pieces

    def _add(self, run: Run | None, at: int, hashes: Sequence[int], owner: str) -> tuple[Run, int]:
        """Put as many new blocks as fit into one run; returns it and the place of the first."""
        longer = (
            run is not None and at == len(run.hashes) < self._run_blocks and run.is_private(owner)
        )
        new = self._unknown(hashes[: self._run_blocks - at if longer else self._run_blocks])
        if run is not None and longer:
            run.hashes.extend(new)
            self._by_use.move_to_end(run)
            first = at
        else:
            if run is not None:
                run.forks[at] = run.forks.get(at, 0) + 1
            run, first = Run(run, at, new), 0
            self._by_use[run] = None
        self.run_of.update(dict.fromkeys(new, run))
        return run, first

    def _unknown(self, hashes: Sequence[int]) -> list[int]:
        """Those before the first that is known or repeats: all, unless an instance is confused."""
        fresh = dict.fromkeys(hashes)
        if len(fresh) < len(hashes) or not self.run_of.keys().isdisjoint(fresh):
            fresh = {}
            for block_hash in hashes:
                if block_hash in fresh or block_hash in self.run_of:
                    break
                fresh[block_hash] = None
        return list(fresh)

    def coldest(self) -> Run:
        """The run used longest ago of those that nothing follows. There must be one."""
        while True:
            run = next(iter(self._by_use))
            if not run.forks:
                return run
            self._by_use.move_to_end(run)

    def abandon(self, runs: Collection[Run]) -> None:
        """Trim many runs: the first few now, the others one by one with `tidy`."""
        self._to_trim += runs
        for _ in range(self._at_once):
            self.tidy()

    def tidy(self) -> None:
        """Trim one of the abandoned runs, if there are any."""
        if self._to_trim:
            self.trim(self._to_trim.pop())

    def trim(self, run: Run | None) -> None:
        """Drop unused blocks at the end of a run, and runs before it when it is gone."""
        while run is not None and run.hashes:
            end = run.num_needed()
            for block_hash in run.hashes[end:]:
                del self.run_of[block_hash]
            del run.hashes[end:]
            if end:
                return
            del self._by_use[run]
            before, run = run, run.parent
            if run is not None:
                run.forks[before.at] -= 1
                if not run.forks[before.at]:
                    del run.forks[before.at]


def leading(mask: int) -> int:
    """Bits set from bit 0 on without a gap."""
    return (~mask & (mask + 1)).bit_length() - 1


def _bits(mask: int) -> Iterator[int]:
    place = 0
    while mask:
        step = (mask & -mask).bit_length()
        place += step
        yield place - 1
        mask >>= step
