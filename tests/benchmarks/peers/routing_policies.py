"""The routing policies of other projects, in the terms of our router, for comparison.

Round robin; the cost function of NVIDIA Dynamo's router; and the rules of SGLang's cache-aware
router with its approximate tree (it learns of a prompt when it is routed, and evicts like a worker's cache).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from random import Random

from serving.kv_router.policy import RoutingRequest, Select

MakeSelect = Callable[[Random], Select]


def round_robin(rng: Random) -> Select:
    return lambda request: list(request.load)[request.turn % len(request.load)]


def dynamo(rng: Random) -> Select:
    """`max(active prefill + prompt - overlap, 0) + decode blocks`, in blocks; the lowest wins."""

    def cost(request: RoutingRequest, name: str) -> float:
        load, size = request.load[name], request.prompt
        prefill = (load.queued_tokens + size.num_tokens) / size.block_size
        return max(prefill - request.overlap.get(name, 0), 0) + load.active_blocks

    def select(request: RoutingRequest) -> str:
        costs = {name: cost(request, name) for name in request.load}
        lowest = min(costs.values())
        return rng.choice([name for name, each in costs.items() if each == lowest])

    return select


def sglang_like(rng: Random, tree_blocks: int = 2000) -> Select:
    """`tree_blocks` are kept of each worker, as many as it holds. Shortest queue when loads are far apart; else the best match if it is over a half of the
    prompt; else the smallest tree. Defaults of its `cache_aware` policy."""
    trees: dict[str, OrderedDict[int, None]] = {}

    def matched(name: str, hashes: list[int]) -> int:
        tree = trees.setdefault(name, OrderedDict())
        return next((n for n, each in enumerate(hashes) if each not in tree), len(hashes))

    def choose(request: RoutingRequest, hashes: list[int]) -> str:
        requests = {name: load.num_requests for name, load in request.load.items()}
        most, least = max(requests.values()), min(requests.values())
        if most - least > 32 and most > 1.0001 * least:
            return min(requests, key=lambda name: requests[name])
        overlap = {name: matched(name, hashes) for name in request.load}
        best = max(overlap, key=lambda name: overlap[name])
        if overlap[best] > 0.5 * max(1, len(hashes)):
            return best
        smallest = min(len(trees[name]) for name in request.load)
        return rng.choice([name for name in request.load if len(trees[name]) == smallest])

    def select(request: RoutingRequest) -> str:
        hashes = list(request.block_hashes)
        chosen = choose(request, hashes)
        tree = trees.setdefault(chosen, OrderedDict())
        for block_hash in reversed(hashes):
            tree[block_hash] = None
            tree.move_to_end(block_hash)
        while len(tree) > tree_blocks:
            tree.popitem(last=False)
        return chosen

    return select


OTHERS: dict[str, MakeSelect] = {
    "round robin": round_robin,
    "dynamo": dynamo,
    "sglang-like": sglang_like,
}
