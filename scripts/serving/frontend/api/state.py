"""What the routes of one frontend process share."""

from __future__ import annotations

import time
from pathlib import Path

from msgspec import Struct, field

from serving.frontend.api.responses.store import ResponseStore
from serving.frontend.http.limits import BODY_TIMEOUT_S, ArrivingBodies, InFlight
from serving.frontend.http.sse import STALL_S
from serving.frontend.metrics.registry import Metrics
from serving.frontend.model import ModelLoader
from serving.frontend.pipeline import Pipeline
from serving.frontend.process_group import ProcessSlot
from serving.protocol import ModelCard


class AppState(Struct, frozen=True, kw_only=True):
    """`launch_id` lets a start script recognise the process that it started. `slot` is None for a
    frontend of one process. `started` is Unix time in seconds."""

    pipeline: Pipeline
    metrics: Metrics
    in_flight: InFlight
    model_name: str
    max_body_bytes: int
    body_timeout_s: float = BODY_TIMEOUT_S
    arriving: ArrivingBodies = field(default_factory=ArrivingBodies)
    stall_s: float = STALL_S
    launch_id: str = ""
    slot: ProcessSlot | None = None
    models: ModelLoader = field(default_factory=ModelLoader)
    responses: ResponseStore = field(default_factory=lambda: ResponseStore(Path(), 0, 0.0))
    started: int = field(default_factory=lambda: int(time.time()))

    aliases: tuple[str, ...] = ()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use for the model."""
        return (self.model_name, *self.aliases)

    @property
    def card(self) -> ModelCard | None:
        """None until a worker has registered."""
        return self.pipeline.card
