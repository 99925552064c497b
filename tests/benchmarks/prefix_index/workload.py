"""Events and prompts for a prefix index. Needs the standard library only: peers import it, too."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

PROMPT_TOKENS, BLOCK_TOKENS = 512 * 32, 32

Event = tuple[int, int | None, list[int]]  # worker, parent, block hashes


class Workload:
    """Chains of 64 to 512 blocks behind prefixes of 32, stored by events of 16 blocks.

    `chains`: each with the worker that has all of it, and those that have its prefix.
    """

    def __init__(self, num_blocks: int, num_workers: int) -> None:
        self._rng = random.Random(1)
        self.chains: list[tuple[array[int], int, list[int]]] = []
        self.num_blocks = 0
        self._target, self._workers = num_blocks, num_workers
        self._prefixes: list[tuple[list[int], list[int]]] = []

    def events(self) -> Iterator[Event]:
        rng = self._rng
        while self.num_blocks < self._target:
            if not self._prefixes or rng.random() < 0.1:
                prefix = self._hashes(32)
                sharers = rng.sample(range(self._workers), rng.randint(1, min(4, self._workers)))
                self._prefixes.append((prefix, sharers))
                for worker in sharers:
                    yield from self._run(worker, None, prefix)
            prefix, sharers = rng.choice(self._prefixes)
            worker, tail = rng.choice(sharers), self._hashes(rng.randint(64, 512) - 32)
            yield from self._run(worker, prefix[-1], tail)
            self.chains.append((array("Q", prefix + tail), worker, sharers))

    def _hashes(self, count: int) -> list[int]:
        return [self._rng.getrandbits(63) | 1 for _ in range(count)]

    def _run(self, worker: int, parent: int | None, hashes: list[int]) -> Iterator[Event]:
        self.num_blocks += len(hashes)
        for at in range(0, len(hashes), 16):
            yield worker, hashes[at - 1] if at else parent, hashes[at : at + 16]

    def prompts(self, length: int, count: int, seed: int) -> Iterator[list[int]]:
        """Known for three quarters; each hash a number of its own."""
        rng = random.Random(seed)
        known = length * 3 // 4
        long_enough = [chain for chain, _, _ in self.chains if len(chain) >= known]
        for _ in range(count):
            chain = rng.choice(long_enough)
            yield chain[:known].tolist() + [rng.getrandbits(63) for _ in range(length - known)]
