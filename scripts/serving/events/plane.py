"""What a worker publishes and a frontend receives: KV events, load reports and snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from serving.errors import DeadlineExceeded, InstanceLost
from serving.events.connection import (
    FAILURES,
    EventCounters,
    Message,
    NatsConnection,
    PlaneLimits,
    Receive,
)
from serving.events.pieces import KvSnapshot, SnapshotParts, snapshot_parts, split_events
from serving.load_report import LoadReport
from serving.protocol import KvEvent, KvEventBatch, KvSnapshotPart, msgpack_encode

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class EventPlane:
    """One process' part in KV events, load reports and snapshots, with or without a connection."""

    def __init__(
        self, url: str, namespace: str, token: str | Path | None, limits: PlaneLimits
    ) -> None:
        self.counters = EventCounters()
        self._limits, self._namespace = limits, namespace
        self._connection = NatsConnection(url, namespace, token, limits, self.counters)
        self._connection.on_connected = self._connected
        self._connection.on_disconnected = self._disconnected
        # Messages are lost, as when there was no connection.
        self._connection.on_overrun = self._report_reconnect
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(limits.queue_messages)
        self._queued_bytes = 0
        self._waiting: set[asyncio.Future[KvSnapshot]] = set()
        self._identity: tuple[str, int] | None = None
        self._seq = 0
        self._unseen_loss = False
        self.on_reconnect: Callable[[], None] | None = None
        """Called when the subscriptions are in place, the first time included, and when messages
        were dropped because this process is slow. Messages were lost, so snapshots are needed."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        namespace: str,
        token: str | Path | None = None,
        limits: PlaneLimits | None = None,
    ) -> AsyncIterator[EventPlane]:
        """`token` is a string, or the file that holds it (read again at every connection).

        Enters at once, whether or not a server is there.
        """
        limits = limits or PlaneLimits()
        plane = cls(url, namespace, token, limits)
        tasks = [
            asyncio.create_task(plane._connection.stay_connected(), name="nats-connection"),
            asyncio.create_task(plane._write(), name="nats-writer"),
        ]
        try:
            yield plane
        finally:
            for task in tasks:
                await _end(task, 2 * limits.call_s)

    @property
    def connected(self) -> bool:
        return self._connection.client is not None

    # --- workers -----------------------------------------------------------------------------

    async def serve_snapshots(
        self,
        instance_id: str,
        epoch: int,
        block_hashes: Callable[[], Collection[int]],
        host_hashes: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """Publish as this instance from now on, and answer snapshot requests.

        `block_hashes()`, on the device, and `host_hashes()` must agree with the events handed to
        `publish_kv` so far.
        """
        self._identity = (instance_id, epoch)
        self._connection.name = instance_id
        self._seq = 0

        async def answer(request: Message) -> None:
            held = list(block_hashes()), list(host_hashes())
            snapshot = KvSnapshot(instance_id, epoch, self._seq, *held)
            for part in snapshot_parts(snapshot, self._connection.max_payload):
                await request.respond(msgpack_encode(part))

        await self._connection.listen(f"{self._namespace}.snapshot.{instance_id}", answer)

    def publish_kv(self, events: Sequence[KvEvent], load: LoadReport | None = None) -> None:
        """Number and send the KV events of one engine step, if it has any, with the load after it.

        Never waits, never fails.
        """
        parts = split_events(events, self._connection.max_payload)
        for part in parts[:-1]:
            self._publish_batch(part)
        for part in parts[-1:]:
            self._publish_batch(part, load)

    def publish_load(self, report: LoadReport) -> None:
        """Send one load report; never waits, never fails."""
        self._enqueue(f"{self._namespace}.load.{report.instance_id}", msgpack_encode(report))

    @property
    def seq(self) -> int:
        """Number of the last KV event batch, sent or lost."""
        return self._seq

    def _publish_batch(self, events: list[KvEvent], load: LoadReport | None = None) -> None:
        # Numbered even when it cannot be sent, so that receivers notice the gap.
        self._seq += 1
        if self._identity is None:
            return
        instance_id, epoch = self._identity
        batch = KvEventBatch(instance_id, epoch, self._seq, events, load)
        self._enqueue(f"{self._namespace}.kv.{instance_id}", msgpack_encode(batch))

    def _enqueue(self, subject: str, payload: bytes) -> None:
        num_bytes = self._queued_bytes + len(payload)
        full = self._queue.full() or num_bytes > self._limits.queue_bytes
        if self._connection.client is None or full:
            self._lose()
        else:
            self._queued_bytes += len(payload)
            self._queue.put_nowait((subject, payload))

    def _lose(self) -> None:
        self.counters.dropped += 1
        self._unseen_loss = True

    def _reveal_loss(self) -> None:
        """Receivers notice a gap only by the batch behind it. Send an empty one, since the next batch
        of events may take long."""
        if self._unseen_loss and self._identity is not None:
            self._unseen_loss = False
            self._publish_batch([])

    async def _write(self) -> None:
        while True:
            subject, payload = await self._queue.get()
            self._queued_bytes -= len(payload)
            client = self._connection.client
            try:
                if client is None:
                    raise ConnectionError("disconnected")
                await client.publish(subject, payload)
                self.counters.published += 1
            except FAILURES as exc:
                # Revealed by the next connection, or behind the next message that is sent. Now,
                # the message that reveals it would fail like this one, at once and for ever.
                self._lose()
                log.debug("not published to %s: %s", subject, exc)
                await asyncio.sleep(0)  # a failed publish does not yield
                continue
            if self._queue.empty():
                self._reveal_loss()

    # --- frontends ---------------------------------------------------------------------------

    async def subscribe(
        self,
        on_kv: Callable[[KvEventBatch], None],
        on_load: Callable[[LoadReport], None],
    ) -> None:
        """Receive from all instances of the namespace. See also `on_reconnect`."""

        def on_batch(batch: KvEventBatch) -> None:
            on_kv(batch)
            if batch.load is not None:
                on_load(batch.load)

        await self._connection.listen(
            f"{self._namespace}.kv.*", self._decoding(KvEventBatch, on_batch)
        )
        await self._connection.listen(
            f"{self._namespace}.load.*", self._decoding(LoadReport, on_load)
        )

    async def request_snapshot(self, instance_id: str, deadline_s: float) -> KvSnapshot:
        """Ask one worker for the blocks that it holds.

        Raises InstanceLost when NATS is away or goes away, or no worker of that name serves
        snapshots; DeadlineExceeded when the answer is not complete in time.
        """
        answer: asyncio.Future[KvSnapshot] = asyncio.get_running_loop().create_future()
        receive = self._collect(instance_id, SnapshotParts(answer))
        self._waiting.add(answer)
        try:
            async with self._connection.request(
                f"{self._namespace}.snapshot.{instance_id}", receive
            ):
                return await asyncio.wait_for(answer, deadline_s)
        except TimeoutError:
            raise DeadlineExceeded("snapshot", deadline_s) from None
        except FAILURES as exc:
            raise InstanceLost(instance_id, str(exc)) from exc
        finally:
            self._waiting.discard(answer)

    def _collect(self, instance_id: str, collected: SnapshotParts) -> Receive:
        receive = self._decoding(KvSnapshotPart, collected.add)

        async def receive_or_fail(message: Message) -> None:
            if message.headers and message.headers.get("Status") == "503":
                collected.fail(InstanceLost(instance_id, "nobody serves its snapshots"))
            else:
                await receive(message)

        return receive_or_fail

    def _decoding(self, kind: type[_T], deliver: Callable[[_T], None]) -> Receive:
        decode = msgspec.msgpack.Decoder(kind).decode

        async def receive(message: Message) -> None:
            self.counters.received += 1
            try:
                decoded = decode(message.data)
            except msgspec.MsgspecError as exc:
                self.counters.undecodable += 1
                log.debug("undecodable message on %s: %s", message.subject, exc)
                return
            deliver(decoded)

        return receive

    # --- the connection comes and goes ---------------------------------------------------------

    def _connected(self) -> None:
        self._reveal_loss()
        self._report_reconnect()

    def _disconnected(self) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(ConnectionError("NATS disconnected"))
                answer.exception()  # retrieved, in case its request fails by itself first

    def _report_reconnect(self) -> None:
        if self.on_reconnect is not None:
            try:
                self.on_reconnect()
            except Exception:
                log.exception("on_reconnect failed")


async def _end(task: asyncio.Task[None], pause_s: float) -> None:
    """Cancel repeatedly: the client library swallows some cancellations."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=pause_s)
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.error("the connection to NATS failed", exc_info=exc)
