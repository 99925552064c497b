"""How long fetching some bytes may take, by how long fetches have taken so far.

A peer that is stopped holds its connections open and sends nothing. Waiting for the whole of
`kv_transfer.transfer_s` would be a long silence, in which the prompt could be computed anew.
"""

from __future__ import annotations

LEAST_S = 3.0
"""Room for a pause of a machine, however fast the fetches are."""
FACTOR = 10.0
FORGET = 0.95
"""Share of the slowest fetch that each fetch after it leaves."""


class TransferPace:
    """Remembers the slowest fetch of late and the largest one. `most_s` is the limit before any."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._slowest_s = 0.0
        self._most_bytes = 0

    def limit_s(self, num_bytes: int, num_others: int) -> float:
        """For a fetch that shares the way with `num_others` fetches. At most `most_s`."""
        if not self._most_bytes:
            return self._most_s
        larger = max(1.0, num_bytes / self._most_bytes)
        expected_s = self._slowest_s * larger * (1 + num_others)
        return min(self._most_s, LEAST_S + FACTOR * expected_s)

    def took(self, num_bytes: int, seconds: float) -> None:
        """A fetch is complete."""
        self._slowest_s = max(FORGET * self._slowest_s, seconds)
        self._most_bytes = max(self._most_bytes, num_bytes)
