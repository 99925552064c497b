"""The routing policies: overlap and load in, an instance out, as pure functions.

Costs are in blocks, and the lowest wins.

    kv, prefill   (queued tokens + weight * tokens of the prompt that are not cached) / block size
    kv, decode    active blocks + weight * blocks that are missing there
    kv, agg       the prefill cost + active blocks / `BLOCKS_READ_PER_COMPUTED`
    least_loaded  queued tokens / block size + active blocks

Counting the queue of an instance beside what it would have to compute keeps a popular prefix
from drawing every request to one instance. Once the queue there costs more than computing the
prefix elsewhere, another instance wins, and the prefix is cached twice. Computation also makes
later requests wait; a weight above 1 accounts for that. A missing block costs a decode instance
memory and a transfer. Blocks in a host tier count for a part of one on the device.

No state and no clock: the caller passes in what varies (the turn of `round_robin`, randomness).
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
"""Held blocks slow the computation beside them, since each step reads them all, but far less than
computing as many would. With a 16th to a 64th, first tokens come as early as without this term."""


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


class RoutingRequest(NamedTuple):
    """A request to be routed to one of the instances in `load`, which is not empty.

    `overlap` maps instances to the value of the leading blocks that they hold, in blocks; an
    absent instance holds none. `turn` counts the requests of this role. `block_hashes` names the
    prompt's full blocks, if they are known; some instance holds the first `num_known_blocks`.
    """

    role: Role
    prompt: PromptSize
    overlap: Mapping[str, float]
    load: Mapping[str, Load]
    turn: int = 0
    block_hashes: Sequence[int] = ()
    num_known_blocks: int = 0

    @property
    def new_content(self) -> int | None:
        """The hash of the first block that no instance holds; None when no block is known."""
        if not self.block_hashes:
            return None
        return self.block_hashes[min(self.num_known_blocks, len(self.block_hashes) - 1)]


Select = Callable[[RoutingRequest], str]


def select(request: RoutingRequest, *, config: RouterConfig, rng: Random) -> str:
    """The instance that gets the request."""
    prompt, load = request.prompt, request.load
    instances = list(load)
    if config.policy == "round_robin":
        return instances[request.turn % len(instances)]
    if config.policy == "random":
        return rng.choice(instances)
    if config.policy == "least_loaded":
        costs = [
            each.queued_tokens / prompt.block_size + each.active_blocks for each in load.values()
        ]
        return cheapest(instances, costs, rng)
    costs = kv_costs(request, config.overlap_weight)
    if config.temperature:
        return instances[sample(costs, config.temperature, rng)]
    return cheapest(instances, costs, rng, request.new_content)


def kv_costs(request: RoutingRequest, overlap_weight: float) -> list[float]:
    """What it costs, in blocks, to send the prompt to each instance. See the module."""
    prompt, overlap = request.prompt, request.overlap
    if request.role == "decode":
        return [
            load.active_blocks + overlap_weight * prompt.missing_blocks(overlap.get(name, 0))
            for name, load in request.load.items()
        ]
    block_size, num_tokens = prompt.block_size, prompt.num_tokens
    whole_prompt = overlap_weight * num_tokens
    block_cost = 0 if request.role == "prefill" else block_size / BLOCKS_READ_PER_COMPUTED
    costs = []
    for name, load in request.load.items():  # Every instance, for every request: no calls here.
        held = overlap.get(name)
        work = whole_prompt
        if held is not None:
            uncached = num_tokens - int(held * block_size)
            work = overlap_weight * (uncached if uncached > 1 else 1)
        costs.append((load.queued_tokens + work + block_cost * load.active_blocks) / block_size)
    return costs


def cheapest(
    instances: Sequence[str], costs: Sequence[float], rng: Random, content: int | None = None
) -> str:
    """The instance with the lowest cost.

    Ties are broken at random, so that no name is favoured; or by `content`, a hash of what is new
    in the prompt. Frontends that have not seen each other's decisions yet then send equal prompts
    to one instance, and different prompts to different instances.
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
