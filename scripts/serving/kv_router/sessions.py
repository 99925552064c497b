"""Which instance had the last request of each session (`router.session_affinity`).

It serves prompts whose cached blocks the index cannot know.
"""

from __future__ import annotations

from collections import OrderedDict

from serving.protocol import Role

MAX_SESSIONS = 65_536


class Sessions:
    """The most recent `MAX_SESSIONS` sessions, by name and role."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, Role], str] = OrderedDict()

    def last(self, session: str | None, role: Role) -> str | None:
        """The instance that had it, alive or not; None when it is unknown."""
        return None if session is None else self._last.get((session, role))

    def remember(self, session: str | None, role: Role, instance_id: str) -> None:
        """A request of this session went there; no session: nothing to remember."""
        if session is None:
            return
        self._last[session, role] = instance_id
        self._last.move_to_end((session, role))
        if len(self._last) > MAX_SESSIONS:
            self._last.popitem(last=False)
