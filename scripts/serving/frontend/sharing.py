"""What this frontend sends to workers, told to the other frontends, and what they tell.

A few milliseconds of decisions go in one message, and none as long as nobody else is there. Once
a second each frontend says that it is. Nothing waits for an answer: a message that is lost leaves
others with what the workers report, as a frontend that dies does.
"""

from __future__ import annotations

import asyncio
import uuid

from serving.events import EventPlane
from serving.kv_router.router import KvRouter
from serving.protocol import Routed, RoutedBatch

BATCH_S = 0.001
HERE_EVERY_S = 1.0
GONE_AFTER_S = 3.5


class Sharing:
    """One frontend among others. All methods run on the event loop's thread."""

    def __init__(self, router: KvRouter, events: EventPlane) -> None:
        self.frontend_id = uuid.uuid4().hex[:12]
        self._router, self._events = router, events
        self._others: dict[str, float] = {}  # when each was heard last
        self._batch: list[Routed] = []
        self._loop = asyncio.get_running_loop()
        router.on_routed = self.routed

    @property
    def num_others(self) -> int:
        return len(self._others)

    def routed(self, routed: Routed) -> None:
        """We sent a request somewhere."""
        if not self._others:
            return
        self._batch.append(routed)
        if len(self._batch) == 1:
            self._loop.call_later(BATCH_S, self._publish)

    def on_batch(self, batch: RoutedBatch) -> None:
        """A frontend has spoken; our own messages come back too."""
        other = batch.frontend_id
        if other == self.frontend_id:
            self._router.others.echoed(BATCH_S + self._loop.time() - batch.sent_s)
            return
        is_new = other not in self._others
        self._others[other] = self._loop.time()
        if is_new:
            self._agree()
            self._publish()  # It should not have to wait for our next sign of life.
        self._router.on_others_routed(batch)

    async def stay_in_touch(self) -> None:
        """Say that we are here, and notice who no longer is."""
        while True:
            self._publish()
            limit = self._loop.time() - GONE_AFTER_S
            gone = [other for other, heard_at in self._others.items() if heard_at < limit]
            for other in gone:
                del self._others[other]
            if gone:
                self._agree()
            await asyncio.sleep(HERE_EVERY_S)

    def _agree(self) -> None:
        self._router.others.set_frontends(self.frontend_id, self._others)

    def _publish(self) -> None:
        batch, self._batch = self._batch, []
        self._events.publish_routed(RoutedBatch(self.frontend_id, batch, self._loop.time()))
