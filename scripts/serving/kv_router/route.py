"""A routed request: what the router knows of its prompt, and its share of an instance's load."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple, Self

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


class Route:
    """The instance that a request goes to. A context manager: the request counts as load there
    until the context ends."""

    __slots__ = (
        "_block_size",
        "_breaker",
        "_is_probe",
        "_reservation",
        "_room",
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
        is_probe: bool,
    ) -> None:
        """`is_probe`: this request shows whether an instance that failed works again."""
        self.request_id, self.role, self.instance = request_id, role, instance
        self.overlap_blocks, self.prompt_blocks = overlap_blocks, size.num_blocks
        self._reservation = reservation
        self._breaker, self._is_probe = breaker, is_probe
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
        if self._is_probe:
            self._breaker.probe_ended()

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
