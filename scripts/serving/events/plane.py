"""One process' connection to NATS: made, watched and remade in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError

from serving.errors import DeadlineExceeded, InstanceLost
from serving.events.pieces import KvSnapshot, SnapshotParts, snapshot_parts, split_events
from serving.load_report import LoadReport
from serving.protocol import KvEvent, KvEventBatch, KvSnapshotPart, msgpack_encode

log = logging.getLogger(__name__)

RECONNECT_S = 0.25
CALL_S = 5
"""Deadline of every single exchange with the NATS server."""
PING_S = 5.0
QUEUE_MESSAGES, QUEUE_BYTES = 8192, 64 << 20
"""What may wait for the server; beyond that messages are dropped and counted."""
PENDING_MESSAGES = 1 << 20
PENDING_BYTES = 256 << 20
MAX_PAYLOAD_BYTES = 1 << 20
"""NATS' default, assumed until a server has said otherwise."""
_FAILURES = (OSError, NatsError, TimeoutError)
_T = TypeVar("_T")


@dataclass
class EventCounters:
    """What happened so far on this side of the event plane, in messages."""

    published: int = 0
    dropped: int = 0
    received: int = 0
    undecodable: int = 0
    slow_consumer: int = 0
    connects: int = 0


@dataclass(frozen=True)
class _Interest:
    subject: str
    receive: Callable[[Msg], Awaitable[None]]


class EventPlane:
    """A connection to NATS that is made, watched and remade in the background."""

    def __init__(self, url: str, namespace: str, token: str | Path | None) -> None:
        self.counters = EventCounters()
        self._url, self._namespace, self._token = url, namespace, token
        self._client: Client | None = None
        self._max_payload = MAX_PAYLOAD_BYTES
        self._interests: list[_Interest] = []
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(QUEUE_MESSAGES)
        self._queued_bytes = 0
        self._waiting: set[asyncio.Future[KvSnapshot]] = set()
        self._identity: tuple[str, int] | None = None
        self._seq = 0
        self._unseen_loss = False
        self.on_reconnect: Callable[[], None] | None = None
        """Called whenever the subscriptions are in place again, the first time included, and when
        messages were dropped because we are slow: what was published meanwhile is lost, so it is
        time to ask for snapshots."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, namespace: str, token: str | Path | None = None
    ) -> AsyncIterator[EventPlane]:
        """`token` is a string, or the file that holds it (read again at every connection).

        Enters at once, whether or not a server is there.
        """
        plane = cls(url, namespace, token)
        tasks = [
            asyncio.create_task(plane._stay_connected(), name="nats-connection"),
            asyncio.create_task(plane._write(), name="nats-writer"),
        ]
        try:
            yield plane
        finally:
            for task in tasks:
                await _end(task)

    @property
    def connected(self) -> bool:
        return self._client is not None

    # --- worker side ---------------------------------------------------------------------------

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
        self._seq = 0

        async def answer(request: Msg) -> None:
            held = list(block_hashes()), list(host_hashes())
            snapshot = KvSnapshot(instance_id, epoch, self._seq, *held)
            for part in snapshot_parts(snapshot, self._max_payload):
                await request.respond(msgpack_encode(part))

        await self._listen(f"{self._namespace}.snapshot.{instance_id}", answer)

    def publish_kv(self, events: Sequence[KvEvent], load: LoadReport | None = None) -> None:
        """Number and send the cache events of one engine step, if it has any, and the load after
        it; never waits, never fails."""
        parts = split_events(events, self._max_payload)
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
        # Numbered even when it cannot be sent: that is how receivers notice.
        self._seq += 1
        if self._identity is None:
            return
        instance_id, epoch = self._identity
        batch = KvEventBatch(instance_id, epoch, self._seq, events, load)
        self._enqueue(f"{self._namespace}.kv.{instance_id}", msgpack_encode(batch))

    def _enqueue(self, subject: str, payload: bytes) -> None:
        full = self._queue.full() or self._queued_bytes + len(payload) > QUEUE_BYTES
        if self._client is None or full:
            self._lose()
        else:
            self._queued_bytes += len(payload)
            self._queue.put_nowait((subject, payload))

    def _lose(self) -> None:
        self.counters.dropped += 1
        self._unseen_loss = True

    def _reveal_loss(self) -> None:
        """Receivers see a gap only by the batch behind it, which may be a long time coming."""
        if self._unseen_loss and self._identity is not None:
            self._unseen_loss = False
            self._publish_batch([])

    async def _write(self) -> None:
        while True:
            subject, payload = await self._queue.get()
            self._queued_bytes -= len(payload)
            client = self._client
            try:
                if client is None:
                    raise ConnectionError("disconnected")
                await client.publish(subject, payload)
                self.counters.published += 1
            except _FAILURES as exc:
                self._lose()
                log.debug("not published to %s: %s", subject, exc)
            if self._queue.empty() and self._client is not None:
                self._reveal_loss()

    # --- frontend side -------------------------------------------------------------------------

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

        await self._listen(f"{self._namespace}.kv.*", self._decoding(KvEventBatch, on_batch))
        await self._listen(f"{self._namespace}.load.*", self._decoding(LoadReport, on_load))

    async def request_snapshot(self, instance_id: str, deadline_s: float) -> KvSnapshot:
        """Ask one worker what it holds.

        Raises InstanceLost when NATS is away or goes away, or nobody answers under that name;
        DeadlineExceeded when the answer is not complete in time.
        """
        client = self._client
        if client is None:
            raise InstanceLost(instance_id, "the event plane is disconnected")
        answer: asyncio.Future[KvSnapshot] = asyncio.get_running_loop().create_future()
        collected = SnapshotParts(answer)
        self._waiting.add(answer)
        subscription: Subscription | None = None
        try:
            inbox = client.new_inbox()
            subscription = await client.subscribe(
                inbox,
                cb=self._collect(instance_id, collected),
                pending_msgs_limit=PENDING_MESSAGES,
                pending_bytes_limit=PENDING_BYTES,
            )
            await client.publish(f"{self._namespace}.snapshot.{instance_id}", reply=inbox)
            return await asyncio.wait_for(answer, deadline_s)
        except TimeoutError:
            raise DeadlineExceeded("snapshot", deadline_s) from None
        except (OSError, NatsError) as exc:
            raise InstanceLost(instance_id, str(exc)) from exc
        finally:
            self._waiting.discard(answer)
            if subscription is not None:
                with suppress(*_FAILURES):  # the connection is gone, and the inbox with it
                    await subscription.unsubscribe()

    def _collect(
        self, instance_id: str, collected: SnapshotParts
    ) -> Callable[[Msg], Awaitable[None]]:
        receive = self._decoding(KvSnapshotPart, collected.add)

        async def receive_or_fail(message: Msg) -> None:
            if message.headers and message.headers.get("Status") == "503":
                collected.fail(InstanceLost(instance_id, "nobody serves its snapshots"))
            else:
                await receive(message)

        return receive_or_fail

    def _decoding(
        self, kind: type[_T], deliver: Callable[[_T], None]
    ) -> Callable[[Msg], Awaitable[None]]:
        decode = msgspec.msgpack.Decoder(kind).decode

        async def receive(message: Msg) -> None:
            self.counters.received += 1
            try:
                decoded = decode(message.data)
            except msgspec.MsgspecError as exc:
                self.counters.undecodable += 1
                log.debug("undecodable message on %s: %s", message.subject, exc)
                return
            deliver(decoded)

        return receive

    # --- connection ----------------------------------------------------------------------------

    async def _listen(self, subject: str, receive: Callable[[Msg], Awaitable[None]]) -> None:
        interest = _Interest(subject, receive)
        self._interests.append(interest)
        if self._client is not None:
            try:
                await self._subscribe(self._client, interest)
                await self._client.flush(CALL_S)
            except _FAILURES as exc:  # the next connection subscribes again
                log.debug("not subscribed to %s yet: %s", subject, exc)

    @staticmethod
    async def _subscribe(client: Client, interest: _Interest) -> None:
        await client.subscribe(
            interest.subject,
            cb=interest.receive,
            pending_msgs_limit=PENDING_MESSAGES,
            pending_bytes_limit=PENDING_BYTES,
        )

    async def _stay_connected(self) -> None:
        """One client per connection: the library's own reconnect gives up for good when a
        restarted server refuses the old token, and keeps requests waiting meanwhile."""
        reported = ""
        while True:
            num_connects = self.counters.connects
            try:
                await self._one_connection()
            except _FAILURES as exc:
                if self.counters.connects > num_connects or reported != str(exc):
                    log.warning("no connection to NATS at %s: %s", self._url, exc)
                reported = str(exc)
            await asyncio.sleep(RECONNECT_S)

    async def _one_connection(self) -> None:
        client, closed = Client(), asyncio.Event()

        async def on_closed() -> None:
            closed.set()

        try:
            # Two quick attempts; the pause between connections is the caller's.
            await client.connect(
                self._url,
                name=self._identity[0] if self._identity else self._namespace,
                token=self._read_token(),
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=CALL_S,
                flush_timeout=CALL_S,
                error_cb=self._on_error,
                closed_cb=on_closed,
            )
            self._max_payload = client.max_payload
            await self._subscribe_all(client)
            self._client = client
            self.counters.connects += 1
            log.info("connected to NATS at %s", self._url)
            self._reveal_loss()
            self._tell_reconnect()
            await self._watch(client, closed)
        finally:
            self._client = None
            self._fail_waiting()
            with suppress(TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await client.close()

    @staticmethod
    async def _watch(client: Client, closed: asyncio.Event) -> None:
        """Raises one of _FAILURES when the server is gone, or there but does not answer."""
        while True:
            try:
                await asyncio.wait_for(closed.wait(), PING_S)
            except TimeoutError:
                await client.flush(CALL_S)  # a round trip
            else:
                raise ConnectionError("the server closed the connection")

    def _tell_reconnect(self) -> None:
        if self.on_reconnect is not None:
            try:
                self.on_reconnect()
            except Exception:
                log.exception("on_reconnect failed")

    async def _subscribe_all(self, client: Client) -> None:
        """Including what is added to the interests meanwhile."""
        done = 0
        while done < len(self._interests):
            while done < len(self._interests):
                await self._subscribe(client, self._interests[done])
                done += 1
            await client.flush(CALL_S)

    def _fail_waiting(self) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(ConnectionError("the event plane disconnected"))
                answer.exception()  # seen: its request may be about to fail by itself

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, SlowConsumerError):
            self.counters.slow_consumer += 1
            self._tell_reconnect()  # Messages are lost, as when there was no connection.
        elif isinstance(exc, _FAILURES):
            log.debug("NATS: %s", exc)
        else:
            log.error("a receiver of events failed", exc_info=exc)

    def _read_token(self) -> str | None:
        if isinstance(self._token, Path):
            return self._token.read_text().strip()
        return self._token


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel until it holds: the client library swallows cancellations in places."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=2 * CALL_S)
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.error("the event plane failed", exc_info=exc)
