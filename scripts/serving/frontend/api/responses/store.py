"""Responses that clients may continue or fetch later, in SQLite, shared by frontend processes.

It lives in `run/`, so it ends with the deployment. The oldest responses go first when there are
more bytes than configured, and no response is kept for longer than configured.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.errors import InvalidRequest, NotFound, Overloaded
from serving.frontend.api.responses.request import Item

log = logging.getLogger("serving.frontend")

MAX_WAIT_S = 0.1
"""For another frontend process that writes. The event loop waits with it."""
MAX_CHAIN = 1000
_CLEAN_EVERY = 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, created REAL NOT NULL, bytes INTEGER NOT NULL, stored BLOB NOT NULL
)
"""


class StoredResponse(Struct):
    """`input` are the items of its own request, without those of earlier ones."""

    response: dict[str, Any]
    input: list[Item]
    previous_id: str | None = None


class ResponseStore:
    """Blocking, and quick: a write takes a fraction of a millisecond and waits for no disk.

    A database that fails costs no answer: what cannot be kept is not stored.
    """

    def __init__(self, path: Path, max_bytes: int, max_age_s: float) -> None:
        """`max_bytes` 0: nothing is kept."""
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._num_writes = 0
        self._database: sqlite3.Connection | None = None
        if not max_bytes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = _open(path)
        except (OSError, sqlite3.Error) as exc:
            log.warning("responses are not stored: %s cannot be used: %s", path, exc)

    @property
    def is_enabled(self) -> bool:
        return self._database is not None

    def put(self, response_id: str, stored: StoredResponse) -> bool:
        """Whether it is stored. Never raises: the answer is complete by now."""
        if self._database is None:
            return False
        data = msgspec.json.encode(stored)
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?)",
                (response_id, time.time(), len(data), data),
            )
        except sqlite3.Error as exc:
            log.warning("response %s is not stored: %s", response_id, exc)
            return False
        self._num_writes += 1
        if self._num_writes % _CLEAN_EVERY == 1 or len(data) > self._max_bytes // _CLEAN_EVERY:
            try:
                self._clean()
            except sqlite3.Error as exc:
                log.warning("old responses are not removed yet: %s", exc)
        return True

    def get(self, response_id: str) -> StoredResponse:
        """Raises NotFound, or Overloaded when the database fails."""
        row = None
        if self._database is not None:
            oldest = time.time() - self._max_age_s
            with _failures_named():
                row = self._database.execute(
                    "SELECT stored FROM responses WHERE id = ? AND created > ?",
                    (response_id, oldest),
                ).fetchone()
        if row is None:
            raise NotFound(f"There is no response `{response_id[:100]}`")
        return msgspec.json.decode(row[0], type=StoredResponse)

    def delete(self, response_id: str) -> None:
        """Raises NotFound, or Overloaded when the database fails."""
        self.get(response_id)
        assert self._database is not None
        with _failures_named():
            self._database.execute("DELETE FROM responses WHERE id = ?", (response_id,))

    def history(self, response_id: str) -> list[Item]:
        """All items up to and including those of this response, the oldest first.

        Raises InvalidRequest when it, or a response that it continues, is not kept (any more), and
        Overloaded when the database fails.
        """
        turns: list[StoredResponse] = []
        current: str | None = response_id
        while current is not None and len(turns) < MAX_CHAIN:
            try:
                turns.append(self.get(current))
            except NotFound:
                raise InvalidRequest(
                    f"Previous response `{current[:100]}` is not stored here",
                    param="previous_response_id",
                    code="previous_response_not_found",
                ) from None
            current = turns[-1].previous_id
        return [
            item for turn in reversed(turns) for item in (*turn.input, *turn.response["output"])
        ]

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def _clean(self) -> None:
        assert self._database is not None
        self._database.execute(
            "DELETE FROM responses WHERE created < ?", (time.time() - self._max_age_s,)
        )
        self._database.execute(
            "DELETE FROM responses WHERE id IN (SELECT id FROM (SELECT id, SUM(bytes) OVER "
            "(ORDER BY created DESC, id) AS total FROM responses) WHERE total > ?)",
            (self._max_bytes,),
        )


def _open(path: Path) -> sqlite3.Connection:
    """Raises OSError and sqlite3.Error."""
    database = sqlite3.connect(path, timeout=MAX_WAIT_S, isolation_level=None)
    path.chmod(0o600)
    # Nothing here outlives the deployment, so a power cut may take what it likes.
    for setting in ("journal_mode=WAL", "synchronous=OFF"):
        database.execute(f"PRAGMA {setting}")
    database.execute(_SCHEMA)
    return database


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise Overloaded(f"Stored responses cannot be read or changed now: {exc}") from exc
