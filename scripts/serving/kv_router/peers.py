"""Routing decisions that the processes of a frontend share, so that they count each other's load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class RoutingDecision(NamedTuple):
    """A request went to an instance: tokens to compute there, and blocks to hold.

    The instance's own reports say when it ended. `registration` is a number for an instance and
    its epoch, the same in every process. `decided_s` is of the router's clock, which all processes
    of one machine share.
    """

    registration: int
    decided_s: float
    queued_tokens: int
    blocks: int


class PeerRouters(Protocol):
    """Routers of other processes, which choose between the same instances."""

    def publish(self, decision: RoutingDecision) -> None:
        """Show them a decision before they make their next one."""

    def updates(self) -> Sequence[RoutingDecision]:
        """Their decisions since the last call, the oldest first."""
