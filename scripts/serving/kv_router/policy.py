"""Overlap and load to an instance: the routing policies, as pure functions.

Costs are in blocks, and the lowest wins.

    kv, prefill   (queued tokens + weight * tokens of the prompt that are not cached) / block size
    kv, decode    active blocks + weight * blocks that are missing there
    kv, agg       the prefill cost + active blocks / `BLOCKS_READ_PER_COMPUTED`
    least_loaded  queued tokens / block size + active blocks

Counting the queue of an instance beside what it would have to compute keeps a popular prefix
from drawing everything to one instance: once the queue there costs more than computing the
prefix elsewhere, elsewhere wins, and the prefix is then cached twice. What is computed also makes
later requests wait; that is what a weight above 1 is for. A missing block costs a decode instance
memory and a transfer. Blocks in a host tier count for a part of one on the device.

No state, no clock: what varies (the turn of `round_robin`, randomness) is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from serving.config import RouterConfig
from serving.kv_router.load import Load
from serving.protocol import Role

BLOCKS_READ_PER_COMPUTED = 32
"""Held blocks slow what is computed beside them, since each step reads them all, but far less than
computing as many would. At a 16th to a 64th, first tokens come as early as without this term."""


class PromptSize(NamedTuple):
    """Length of a prompt in tokens, and the block size."""

    num_tokens: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks that the prompt occupies, the last one possibly in part."""
        return -(-self.num_tokens // self.block_size)

    def uncached_tokens(self, overlap_blocks: float) -> int:
        """Tokens left to compute; never none, because the last one's logits are needed."""
        return max(1, self.num_tokens - int(overlap_blocks * self.block_size))

    def missing_blocks(self, overlap_blocks: float) -> float:
        """Blocks that are not held yet."""
        return self.num_blocks - overlap_blocks


class Choice(NamedTuple):
    """A request to be sent to one of the keys of `load`, which is not empty.

    `overlap` maps instances to what leading blocks of the prompt there are worth; one that is
    absent holds none. `turn` counts the requests of this role. `content` is a hash of what is new
    in the prompt, if that is known.
    """

    role: Role
    prompt: PromptSize
    overlap: Mapping[str, float]
    load: Mapping[str, Load]
    turn: int = 0
    content: int | None = None
    hashes: Sequence[int] = ()


Select = Callable[[Choice], str]


def select(choice: Choice, *, config: RouterConfig, rng: Random) -> str:
    """The instance that gets the request."""
    prompt, load = choice.prompt, choice.load
    instances = list(load)
    if config.policy == "round_robin":
        return instances[choice.turn % len(instances)]
    if config.policy == "random":
        return rng.choice(instances)
    if config.policy == "least_loaded":
        costs = [of.queued_tokens / prompt.block_size + of.active_blocks for of in load.values()]
        return cheapest(instances, costs, rng)
    costs = kv_costs(choice, config.overlap_weight)
    if config.temperature:
        return instances[sample(costs, config.temperature, rng)]
    return cheapest(instances, costs, rng, choice.content)


def kv_costs(choice: Choice, overlap_weight: float) -> list[float]:
    """What it costs, in blocks, to send the prompt to each instance. See the module."""
    prompt, overlap = choice.prompt, choice.overlap
    if choice.role == "decode":
        return [
            of.active_blocks + overlap_weight * prompt.missing_blocks(overlap.get(name, 0))
            for name, of in choice.load.items()
        ]
    block_size, num_tokens = prompt.block_size, prompt.num_tokens
    nothing = overlap_weight * num_tokens
    held_costs = 0 if choice.role == "prefill" else block_size / BLOCKS_READ_PER_COMPUTED
    costs = []
    for name, of in choice.load.items():  # Every instance, for every request: no calls here.
        held = overlap.get(name)
        work = nothing
        if held is not None:
            left = num_tokens - int(held * block_size)
            work = overlap_weight * (left if left > 1 else 1)
        costs.append((of.queued_tokens + work + held_costs * of.active_blocks) / block_size)
    return costs


def cheapest(
    instances: Sequence[str], costs: Sequence[float], rng: Random, content: int | None = None
) -> str:
    """The instance with the lowest cost.

    Equals share at random, so that no one is favoured by name; or by `content`, a hash of what is
    new in the prompt: then frontends that know nothing of each other yet send equal prompts to
    one instance, and different ones to different instances.
    """
    lowest = min(costs)
    ties = [name for name, cost in zip(instances, costs, strict=True) if cost == lowest]
    if len(ties) == 1:
        return ties[0]
    if content is None:
        return rng.choice(ties)
    return max(ties, key=lambda name: xxh3_64_intdigest(name.encode(), content))


def sample(costs: Sequence[float], temperature: float, rng: Random) -> int:
    """A position drawn with probability proportional to exp(-cost / temperature).

    Costs are first scaled to 0 .. 1 over their spread, so that a temperature means the same for
    short and long prompts.
    """
    lowest = min(costs)
    spread = (max(costs) - lowest) or 1.0
    weights = [math.exp((lowest - cost) / spread / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
