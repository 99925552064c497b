"""The `router` section."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Positive, Section

Policy = Literal["kv", "round_robin", "random", "least_loaded"]


class RouterConfig(Section, frozen=True):
    """How the router chooses a worker for a request. The `*_router` targets always use `kv`."""

    policy: Annotated[
        Policy,
        Meta(description="`kv` weighs cached prefix and load; the others ignore the cache."),
    ] = "kv"
    overlap_weight: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(
            description="For `kv`: weight of the prompt blocks that a worker lacks against its load. Higher values give a better hit rate and a less even load."
        ),
    ] = 2.0
    host_tier_weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="Worth of a cached block in a worker's host memory. A block on the device counts as 1."
        ),
    ] = 0.75
    temperature: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(description="Softmax temperature over costs; 0 picks the cheapest worker."),
    ] = 0.0
    session_affinity: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="Share of a prompt that counts as cached on the worker that served the session's last request. With policies other than `kv`, any value above 0 keeps a session on its worker."
        ),
    ] = 0.0
    local_prefill_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="A decode worker computes the rest of a prompt itself when it lacks at most this many tokens. Default: one block."
        ),
    ] = None
    local_prefill_when_idle: Annotated[
        bool,
        Meta(
            description="An idle decode worker also computes a prompt itself when it would finish before any prefill worker."
        ),
    ] = False
    index_max_blocks: Annotated[
        Positive,
        Meta(
            description="Blocks that the prefix index remembers, at about 100 bytes each. It forgets the least recently used ones first."
        ),
    ] = 4_000_000
