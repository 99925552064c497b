"""What the routes of one frontend process share."""

from __future__ import annotations

import time
from pathlib import Path

from msgspec import Struct, field

from serving.frontend.api.responses.store import ResponseStore
from serving.frontend.http.limits import BODY_TIMEOUT_S, ArrivingBodies
from serving.frontend.http.sse import STALL_S
from serving.frontend.process_group import ProcessSlot
from serving.frontend.served.model import ServedModels


class AppState(Struct, frozen=True, kw_only=True):
    """`launch_id` lets a start script recognise the process that it started. `slot` is None for a
    frontend of one process. `started` is Unix time in seconds."""

    models: ServedModels
    max_body_bytes: int
    body_timeout_s: float = BODY_TIMEOUT_S
    arriving: ArrivingBodies = field(default_factory=ArrivingBodies)
    stall_s: float = STALL_S
    launch_id: str = ""
    slot: ProcessSlot | None = None
    responses: ResponseStore = field(default_factory=lambda: ResponseStore(Path(), 0, 0.0))
    started: int = field(default_factory=lambda: int(time.time()))
