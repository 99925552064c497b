"""A routed request: the prompt as the router sees it, and the decision while it holds."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from serving.kv_router.breaker import Breaker
from serving.kv_router.load import Reservation
from serving.kv_router.policy import PromptSize
from serving.protocol import InstanceInfo, Role


class PromptHashes(NamedTuple):
    """A prompt as the router sees it, computed once however often it is routed.

    `block_hashes` covers full blocks only, and is empty under a policy that ignores the cache.
    """

    num_tokens: int
    block_hashes: list[int]


class Sent(NamedTuple):
    """A request was sent to an instance: it means so many tokens to compute there and so many
    blocks to hold. That it ended is left to the instance's own reports.

    `registration` is a number for an instance and its epoch, the same in every process. `sent_s` is
    of the router's clock, which processes of one machine share.
    """

    registration: int
    sent_s: float
    queued_tokens: int
    blocks: int


class Others(Protocol):
    """Routers of other processes, which send requests to the same instances."""

    def tell(self, sent: Sent) -> None:
        """Let them know, before they decide next."""

    def news(self) -> Sequence[Sent]:
        """What they have sent since the last time, the oldest first."""


class Route:
    """A decision that holds. A context manager: the load it means is counted until it ends."""

    __slots__ = (
        "_block_size",
        "_breaker",
        "_reservation",
        "_room",
        "_tries",
        "instance",
        "overlap_blocks",
        "prompt_blocks",
        "request_id",
        "role",
    )

    def __init__(
        self,
        request_id: str,
        role: Role,
        instance: InstanceInfo,
        size: PromptSize,
        overlap_blocks: int,
        reservation: Reservation,
        breaker: Breaker,
        tries: bool,
    ) -> None:
        """`tries`: whether this request shows if an instance that failed can be trusted again."""
        self.request_id, self.role, self.instance = request_id, role, instance
        self.overlap_blocks, self.prompt_blocks = overlap_blocks, size.num_blocks
        self._reservation = reservation
        self._breaker, self._tries = breaker, tries
        self._block_size = size.block_size
        self._room = size.num_blocks * size.block_size - size.num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reservation.release()
        if self._tries:
            self._breaker.try_over()

    @property
    def instance_id(self) -> str:
        return self.instance.instance_id

    @property
    def overlap_tokens(self) -> int:
        """Leading prompt tokens that the instance already holds."""
        return self.overlap_blocks * self._block_size

    def first_output(self) -> None:
        """The prompt is computed: it no longer counts as queued."""
        self._reservation.prefilled()
        self._breaker.succeeded()

    def finished(self) -> None:
        """The last output, and no error."""
        self._breaker.finished()

    def generated(self, num_tokens: int) -> None:
        """`num_tokens` more were generated, and are held in blocks."""
        self._room -= num_tokens
        if self._room < 0:
            blocks = -(self._room // self._block_size)
            self._room += blocks * self._block_size
            self._reservation.grow(blocks)
