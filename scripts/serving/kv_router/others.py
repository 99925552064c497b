"""Other frontends that decide at the same moment, and whose turn it is.

What a frontend sends is known to the others some milliseconds later. Requests of one burst are
decided within that time by all of them, each seeing the same idle instance, and meet there. Where
that happens, frontends take turns: each waits a turn for every frontend before it, and by then knows
what those did. A turn is as long as news take, which each frontend sees by its own coming back. Only the shortest prompts do not wait: against computing the others
it is little, and less than to be sent, at the same moment as a long one, where that one goes.
"""

from __future__ import annotations

from collections.abc import Collection

TURN_S = 0.005
"""Longer than the news of a decision takes on a machine that is not busy, batching included."""
LONGEST_TURN_S = 0.02
NEWS_PER_TURN = 1.5
"""The others may be busier than we are, who measure."""
MAX_TURNS = 4
MIN_PROMPT_TOKENS = 256
ENOUGH = 0.5
"""Take turns when so many requests of others coincide with one of ours, on average."""
LEARNING = 0.05
"""Weight of the newest observation in that average."""
LEARNING_NEWS = 0.2
"""Of the newest in the time that news take, which a burst changes."""
FIRST_GUESS = 1.0
"""That average before anything was observed. Frontends start together, and workers are idle then: a
first burst would meet. To be wrong costs a dozen requests some milliseconds."""


class Others:
    """Who else is there, and how often they decide when we do. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.coinciding = FIRST_GUESS
        """Requests that others sent somewhere within a turn's time of one of ours, on average."""
        self._position = 0
        self._window_ends_s = float("-inf")
        self._met = 0
        self._news_s = 0.0

    def set_frontends(self, own: str, others: Collection[str]) -> None:
        """Who is there. All frontends should agree on it, or turns coincide."""
        self._position = sorted({own, *others}).index(own)

    def turn_s(self, prompt_tokens: int) -> float:
        """How long a prompt should wait for its turn to be routed; mostly 0."""
        if self.coinciding < ENOUGH or prompt_tokens < MIN_PROMPT_TOKENS:
            return 0.0
        return min(self._position, MAX_TURNS) * self._turn_s

    @property
    def _turn_s(self) -> float:
        return min(max(TURN_S, NEWS_PER_TURN * self._news_s), LONGEST_TURN_S)

    def echoed(self, after_s: float) -> None:
        """What we told came back to us."""
        self._news_s += LEARNING_NEWS * (after_s - self._news_s)

    def decided(self, now_s: float) -> None:
        """We sent a request somewhere."""
        if now_s > self._window_ends_s:
            self.coinciding += LEARNING * (self._met - self.coinciding)
            self._met = 0
        # Whoever takes turns with us does so before or after.
        self._window_ends_s = now_s + MAX_TURNS * self._turn_s

    def heard(self, num_requests: int, now_s: float) -> None:
        """Others sent so many."""
        if now_s <= self._window_ends_s:
            self._met += num_requests
