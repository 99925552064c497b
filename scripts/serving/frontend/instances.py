"""The live instances as one frontend sees them: a connection to each, and its entry in the router.

Discovery says which instances belong to the service; a connection proves that one is alive. The
router has an instance while both hold and it does not drain. So a killed worker gets no more
requests at once, not only when its lease ends, and a draining worker gets none as soon as it says
that it drains. Neither draining nor a lost registration ends a connection: requests that run there
are finished there, as long as the worker answers.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from msgspec.structs import replace

from serving.errors import InstanceLost, InstanceRefused, ServingError
from serving.events import EventPlane
from serving.frontend.engine_transfer import warm_up
from serving.frontend.metrics.registry import Metrics
from serving.kv_router.router import KvRouter
from serving.load_report import LoadReport, ready_row
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard
from serving.rpc import RpcClient

log = logging.getLogger(__name__)

CONNECT_S = 5.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 2.0
IDLE_POLL_S = 0.2
SNAPSHOT_S = 5.0


class Instances:
    """Owns the connections. All methods run on the event loop's thread."""

    def __init__(
        self,
        router: KvRouter,
        events: EventPlane,
        tasks: asyncio.TaskGroup,
        metrics: Metrics,
        *,
        secret: bytes = b"",
        tokenizer_dir: str = "",
    ) -> None:
        """`secret` proves to workers that this frontend belongs to the deployment. `tokenizer_dir`
        replaces the path in a worker's card, which may be a path on another machine."""
        self._secret, self._tokenizer_dir = secret, tokenizer_dir
        self._router, self._events, self._tasks = router, events, tasks
        self._metrics = metrics
        self._keepers: dict[str, tuple[InstanceInfo, asyncio.Task[None]]] = {}
        self._departing: dict[asyncio.Task[None], RpcClient] = {}
        self._clients: dict[str, RpcClient] = {}
        self._reports: dict[str, LoadReport] = {}
        self._unsynchronised = asyncio.Event()
        self._joining = asyncio.Lock()
        self.card: ModelCard | None = None

    def client(self, instance_id: str) -> RpcClient:
        """Raises InstanceLost when the connection has been lost since routing."""
        try:
            return self._clients[instance_id]
        except KeyError:
            raise InstanceLost(instance_id) from None

    # --- membership ----------------------------------------------------------------------------

    def up(self, info: InstanceInfo) -> None:
        """Discovery has a new registration."""
        log.info("%s is up (epoch %d)", info.instance_id, info.epoch)
        client = self._clients.get(info.instance_id)
        returning = next((task for task, one in self._departing.items() if one is client), None)
        if client is not None and client.info == info and returning is not None:
            del self._departing[returning]
            self._keepers[info.instance_id] = (info, returning)
            self._route_to(client)
            return
        task = self._tasks.create_task(self._keep(info), name=f"keep-{info.instance_id}")
        self._keepers[info.instance_id] = (info, task)

    def down(self, instance_id: str, epoch: int) -> None:
        """Its registration is gone, which says nothing of the instance: it gets no new requests, and
        its streams go on. A draining instance closes the connection when it is done."""
        keeper = self._keepers.get(instance_id)
        if keeper is None or keeper[0].epoch != epoch:
            return
        log.info("%s is gone (epoch %d)", instance_id, epoch)
        _, task = self._keepers.pop(instance_id)
        client = self._clients.get(instance_id)
        if client is None or client.info.epoch != epoch:
            task.cancel()  # not connected
            return
        self._router.remove_instance(instance_id, epoch)
        self._departing[task] = client
        task.add_done_callback(lambda done: self._departing.pop(done, None))
        self._tasks.create_task(self._leave(task, client), name=f"leave-{instance_id}")

    async def _keep(self, info: InstanceInfo) -> None:
        """Hold a connection for as long as discovery names the instance, or requests run there."""
        pause_s = RECONNECT_MIN_S
        while True:
            lost = asyncio.Event()
            client = RpcClient(info, secret=self._secret, merge=True)
            client.on_lost = lost.set
            client.on_draining = lambda: self._on_draining(info)
            client.on_wedged = partial(self._on_wedged, client)
            try:
                await client.connect(CONNECT_S)
                pause_s = RECONNECT_MIN_S
                await self._serve_through(client, lost)
            except InstanceRefused as exc:  # Until the instances that it does not fit are gone.
                log.error("%s", exc)
                pause_s = RECONNECT_MAX_S
            except InstanceLost as exc:
                log.debug("%s", exc)
            finally:
                await client.close()
            if asyncio.current_task() in self._departing:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    async def _serve_through(self, client: RpcClient, lost: asyncio.Event) -> None:
        info = client.info
        async with self._joining:  # Two that join at the same time would miss each other.
            if info.kv_by_engine:
                await warm_up(client, self._kv_peers(info))
            self._route_to(client)
            if self.card is None and info.model.dummy_weights:
                log.warning("%s has dummy weights: answers are noise", info.model.name)
            self.card = self.card or self._readable(info.model)
            self._clients[info.instance_id] = client
            self._limit_context()
        try:
            await lost.wait()
            if client not in self._departing.values():
                log.warning("%s: connection lost", info.instance_id)
        finally:
            if self._clients.get(info.instance_id) is client:  # A successor may be up already.
                del self._clients[info.instance_id]
                self._limit_context()
                self._reports.pop(info.instance_id, None)
                self._router.remove_instance(info.instance_id, info.epoch)
                self._metrics.forget_instance(info.instance_id)

    async def _leave(self, task: asyncio.Task[None], client: RpcClient) -> None:
        """Let the connection of a departed instance end with its last stream. One that drains ends
        the connection itself, since it may hold KV until then."""
        while self._departing.get(task) is client and client.connected:
            if not client.num_streams and not client.draining:
                log.info("%s: nothing runs there any more", client.info.instance_id)
                if client.on_lost is not None:
                    client.on_lost()
                return
            await asyncio.sleep(IDLE_POLL_S)

    def _route_to(self, client: RpcClient) -> None:
        """From now on, unless it drains. Raises InstanceRefused."""
        if not client.draining:
            self._router.add_instance(client.info)
            self._unsynchronised.set()

    def _on_draining(self, info: InstanceInfo) -> None:
        log.info("%s drains: it gets no new requests", info.instance_id)
        self._router.remove_instance(info.instance_id, info.epoch)

    def _on_wedged(self, client: RpcClient, reason: str) -> None:
        """It lives and does not compute, or computes again. Its requests go on elsewhere, unless it
        is the last instance: then waiting is the only chance that they have."""
        info = client.info
        if client.draining or client in self._departing.values():
            if reason and self._has_others(info):
                client.fail_streams(reason)
            return
        if self._clients.get(info.instance_id) is not client:
            return
        is_routed = any(one.epoch == info.epoch for one in self._same_name(info))
        if reason and is_routed and self._has_others(info):
            log.warning("%s gets no requests: %s", info.instance_id, reason)
            self._router.remove_instance(info.instance_id, info.epoch)
        elif not reason and not is_routed:
            log.info("%s computes again", info.instance_id)
            self._route_to(client)
        if reason and self._has_others(info):
            client.fail_streams(reason)

    def _same_name(self, info: InstanceInfo) -> list[InstanceInfo]:
        return [
            one for one in self._router.instances(info.role) if one.instance_id == info.instance_id
        ]

    def _has_others(self, info: InstanceInfo) -> bool:
        """Whether another instance of any role could take its requests."""
        return any(
            self._router.instances(role, exclude={info.instance_id})
            for role in ("agg", "prefill", "decode")
        )

    def _limit_context(self) -> None:
        """Offer the context that every instance has, since a request may go to any of them."""
        contexts = [client.info.model.max_model_len for client in self._clients.values()]
        if self.card is not None and contexts:
            self.card = replace(self.card, max_model_len=min(contexts))

    def _readable(self, card: ModelCard) -> ModelCard:
        """The card with the path of the tokenizer on this machine."""
        if not self._tokenizer_dir:
            return card
        return replace(card, tokenizer_dir=self._tokenizer_dir)

    def _kv_peers(self, info: InstanceInfo) -> list[RpcClient]:
        """Instances of the other role, which exchange KV with this one."""
        return [
            client
            for client in self._clients.values()
            if client.info.role not in (info.role, "agg") and not client.draining
        ]

    # --- events --------------------------------------------------------------------------------

    def on_kv(self, batch: KvEventBatch) -> None:
        self._metrics.observe_index(batch.instance_id, "batch")
        if self._router.on_kv(batch):
            self._unsynchronised.set()

    def on_load(self, report: LoadReport) -> None:
        if report.instance_id in self._clients:
            self._reports[report.instance_id] = report
            self._router.on_load(report)
            self._metrics.observe_load(report)

    def on_reconnect(self) -> None:
        """Events may have been missed. A gap would show that only with the next event."""
        self._router.distrust_index()
        self._unsynchronised.set()

    def close(self) -> None:
        """Close every connection."""
        for task in (*(task for _, task in self._keepers.values()), *self._departing):
            task.cancel()

    async def synchronise_forever(self) -> None:
        """Ask each instance that the index does not match for a snapshot, until all match."""
        while True:
            await self._unsynchronised.wait()
            self._unsynchronised.clear()
            for instance_id in self._router.needs_snapshot():
                try:
                    snapshot = await self._events.request_snapshot(instance_id, SNAPSHOT_S)
                except ServingError as exc:
                    log.debug("no snapshot of %s: %s", instance_id, exc)
                    self._metrics.observe_index(instance_id, "snapshot_failed")
                    continue
                self._metrics.observe_index(instance_id, "snapshot")
                self._router.on_snapshot(
                    instance_id,
                    snapshot.epoch,
                    snapshot.seq,
                    snapshot.block_hashes,
                    snapshot.host_hashes,
                )
            if self._router.needs_snapshot():
                self._unsynchronised.set()
                await asyncio.sleep(RECONNECT_MAX_S / 4)

    # --- for `/ready` ---------------------------------------------------------------------------

    def describe(self) -> list[dict[str, Any]]:
        """One row for each registered instance that is connected."""
        unsynchronised = set(self._router.needs_snapshot())
        breakers = {state.info.instance_id: state.breaker for state in self._router.state()}
        rows = []
        for instance_id in sorted(self._clients.keys() & self._keepers.keys()):
            info = self._keepers[instance_id][0]
            report = self._reports.get(instance_id, LoadReport())
            row = {
                "instance_id": instance_id,
                "role": info.role,
                "epoch": info.epoch,
                "pid": info.pid,
                "host": info.host,
                "synchronised": instance_id not in unsynchronised,
                "breaker": breakers.get(instance_id, "closed"),
                "wedged": self._clients[instance_id].wedged,
            }
            row |= ready_row(report)
            row["num_blocks"] = info.num_blocks  # known before the first report
            rows.append(row)
        return rows
