"""Overlap and load to an instance: the routing policies, as pure functions.

Costs are in blocks, and the lowest wins.

    kv, prefill   (queued tokens + tokens of the prompt that are not cached) / block size
    kv, decode    active blocks + blocks that are missing there
    kv, agg       weight * the prefill cost + active blocks
    least_loaded  queued tokens / block size + active blocks

Counting the queue of an instance beside what it would have to compute keeps a popular prefix
from drawing everything to one instance: once the queue there costs more than computing the
prefix elsewhere, elsewhere wins, and the prefix is then cached twice. A missing block costs a decode
instance memory and a transfer, so there the weight applies to it; where only one term counts
(prefill), a weight would change nothing.

No state, no clock: what varies (the turn of `round_robin`, randomness) is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from serving.config import Policy
from serving.kv_router.load import Load
from serving.protocol import Role


class PromptSize(NamedTuple):
    """Length of a prompt in tokens, and the block size."""

    num_tokens: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the prompt occupies, the last one possibly in part."""
        return -(-self.num_tokens // self.block_size)

    def uncached_tokens(self, overlap_blocks: int) -> int:
        """Tokens left to compute; never none, because the last one's logits are needed."""
        return max(1, self.num_tokens - overlap_blocks * self.block_size)

    def missing_blocks(self, overlap_blocks: int) -> int:
        """Blocks that are not held yet."""
        return self.num_blocks - overlap_blocks


def select(
    policy: Policy,
    role: Role,
    prompt: PromptSize,
    overlap: Mapping[str, int],
    load: Mapping[str, Load],
    *,
    rng: Random,
    turn: int = 0,
    overlap_weight: float = 1.0,
    temperature: float = 0.0,
) -> str:
    """The instance that gets the request: one of the keys of `load`, which must not be empty.

    `overlap` maps instances to leading blocks of the prompt held there; one that is absent holds
    none. `turn` counts the requests of this role and serves `round_robin` only. `temperature`
    applies to `kv` only.
    """
    instances = list(load)
    if policy == "round_robin":
        return instances[turn % len(instances)]
    if policy == "random":
        return rng.choice(instances)
    if policy == "least_loaded":
        costs = [of.queued_tokens / prompt.block_size + of.active_blocks for of in load.values()]
        return instances[cheapest(costs, rng)]
    costs = [
        kv_cost(role, prompt, overlap.get(instance, 0), of, overlap_weight)
        for instance, of in load.items()
    ]
    return instances[sample(costs, temperature, rng) if temperature else cheapest(costs, rng)]


def kv_cost(
    role: Role, prompt: PromptSize, overlap_blocks: int, load: Load, overlap_weight: float
) -> float:
    """What it costs, in blocks, to send the prompt to an instance. See the module."""
    if role == "decode":
        return load.active_blocks + overlap_weight * prompt.missing_blocks(overlap_blocks)
    tokens = load.queued_tokens + prompt.uncached_tokens(overlap_blocks)
    prefill = tokens / prompt.block_size
    return prefill if role == "prefill" else overlap_weight * prefill + load.active_blocks


def cheapest(costs: Sequence[float], rng: Random) -> int:
    """Position of the lowest cost; equals share at random, so that no one is favoured by name."""
    lowest = min(costs)
    ties = [position for position, cost in enumerate(costs) if cost == lowest]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def sample(costs: Sequence[float], temperature: float, rng: Random) -> int:
    """A position drawn with probability proportional to exp(-cost / temperature).

    Costs are first scaled to 0 .. 1 over their spread, so that a temperature means the same for
    short and long prompts.
    """
    lowest = min(costs)
    spread = (max(costs) - lowest) or 1.0
    weights = [math.exp((lowest - cost) / spread / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
