"""One connection to NATS: made, watched and remade in the background.

It keeps subscriptions across connections. It does not know what messages mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nats.aio.client import Client
from nats.aio.msg import Msg as Message
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError

__all__ = ["FAILURES", "EventCounters", "Message", "NatsConnection", "PlaneLimits", "Receive"]

log = logging.getLogger(__name__)

RECONNECT_S = 0.25
MAX_PAYLOAD_BYTES = 1 << 20
"""NATS' default, assumed until a server has reported its own."""
FAILURES = (OSError, NatsError, TimeoutError)
"""How an exchange with the server fails."""

Receive = Callable[[Message], Awaitable[None]]


@dataclass
class EventCounters:
    """What happened so far in this process, in messages."""

    published: int = 0
    dropped: int = 0
    received: int = 0
    undecodable: int = 0
    slow_consumer: int = 0
    connects: int = 0


@dataclass(frozen=True)
class PlaneLimits:
    """How long one process waits for NATS, and how much may queue in it."""

    call_s: int = 5
    """Deadline of every single exchange with the NATS server."""
    ping_s: float = 5.0
    """Time between round trips that check an idle connection."""
    queue_messages: int = 8192
    queue_bytes: int = 64 << 20
    """Messages that wait to be sent. Messages beyond these two are dropped and counted."""
    pending_messages: int = 1 << 20
    pending_bytes: int = 256 << 20
    """Received messages that wait for their receiver. The client library drops the rest."""


def _nothing() -> None:
    """The default of callbacks."""


class NatsConnection:
    """`client` is the client of the current connection, or None between connections."""

    def __init__(
        self,
        url: str,
        name: str,
        token: str | Path | None,
        limits: PlaneLimits,
        counters: EventCounters,
    ) -> None:
        self.client: Client | None = None
        self.name = name
        """How the server's log and monitoring name this client."""
        self.max_payload = MAX_PAYLOAD_BYTES
        self.on_connected: Callable[[], None] = _nothing
        """Called when the subscriptions of a new connection are in place."""
        self.on_disconnected: Callable[[], None] = _nothing
        self.on_overrun: Callable[[], None] = _nothing
        """Called when received messages were dropped because their receiver is slow."""
        self._url, self._token = url, token
        self._limits, self._counters = limits, counters
        self._subscriptions: list[tuple[str, Receive]] = []

    async def listen(self, subject: str, receive: Receive) -> None:
        """Subscribe in this connection and in every later one."""
        self._subscriptions.append((subject, receive))
        if self.client is not None:
            try:
                await self._subscribe(self.client, subject, receive)
                await self.client.flush(self._limits.call_s)
            except FAILURES as exc:  # the next connection subscribes again
                log.debug("not subscribed to %s yet: %s", subject, exc)

    @asynccontextmanager
    async def request(self, subject: str, receive: Receive) -> AsyncIterator[None]:
        """Publish a request; `receive` gets the replies until the context ends.

        Raises one of FAILURES.
        """
        client = self.client
        if client is None:
            raise ConnectionError("NATS is disconnected")
        inbox = client.new_inbox()
        replies = await self._subscribe(client, inbox, receive)
        try:
            await client.publish(subject, reply=inbox)
            yield
        finally:
            with suppress(*FAILURES):  # the connection is gone, and the inbox with it
                await replies.unsubscribe()

    async def _subscribe(self, client: Client, subject: str, receive: Receive) -> Subscription:
        return await client.subscribe(
            subject,
            cb=receive,
            pending_msgs_limit=self._limits.pending_messages,
            pending_bytes_limit=self._limits.pending_bytes,
        )

    async def stay_connected(self) -> None:
        """Connect again and again, until cancelled.

        One client per connection: the library's own reconnect ends for good when a restarted
        server refuses the old token, and requests wait meanwhile.
        """
        reported = ""
        while True:
            num_connects = self._counters.connects
            try:
                await self._connect_once()
            except FAILURES as exc:
                if self._counters.connects > num_connects or reported != str(exc):
                    log.warning("no connection to NATS at %s: %s", self._url, exc)
                reported = str(exc)
            await asyncio.sleep(RECONNECT_S)

    async def _connect_once(self) -> None:
        client, closed = Client(), asyncio.Event()

        async def on_closed() -> None:
            closed.set()

        try:
            # Two quick attempts; the pause between connections is the caller's.
            await client.connect(
                self._url,
                name=self.name,
                token=self._read_token(),
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=self._limits.call_s,
                flush_timeout=self._limits.call_s,
                error_cb=self._on_error,
                closed_cb=on_closed,
            )
            self.max_payload = client.max_payload
            await self._subscribe_all(client)
            self.client = client
            self._counters.connects += 1
            log.info("connected to NATS at %s", self._url)
            self.on_connected()
            await self._watch(client, closed)
        finally:
            self.client = None
            self.on_disconnected()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.call_s):
                    await client.close()

    async def _subscribe_all(self, client: Client) -> None:
        """Including the subscriptions that are added meanwhile."""
        done = 0
        while done < len(self._subscriptions):
            while done < len(self._subscriptions):
                await self._subscribe(client, *self._subscriptions[done])
                done += 1
            await client.flush(self._limits.call_s)

    async def _watch(self, client: Client, closed: asyncio.Event) -> None:
        """Raises one of FAILURES when the server is gone, or there but does not answer."""
        while True:
            try:
                await asyncio.wait_for(closed.wait(), self._limits.ping_s)
            except TimeoutError:
                await client.flush(self._limits.call_s)  # a round trip
            else:
                raise ConnectionError("the server closed the connection")

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, SlowConsumerError):
            self._counters.slow_consumer += 1
            self.on_overrun()
        elif isinstance(exc, FAILURES):
            log.debug("NATS: %s", exc)
        else:
            log.error("a receiver of events failed", exc_info=exc)

    def _read_token(self) -> str | None:
        if isinstance(self._token, Path):
            token = self._token.read_text().strip()
            if not token:
                raise OSError(f"the token in {self._token} is empty")
            return token
        return self._token
