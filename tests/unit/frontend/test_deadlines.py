"""Workers that are silent, slow or busy: how long the pipeline waits for each phase, and what it
then says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving.config import DeadlinesConfig, FrontendConfig, RouterConfig
from serving.config.process import ControlServices, FrontendSettings
from serving.errors import DeadlineExceeded, InstanceLost, Overloaded, QueuedTooLong
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.kv_router.router import KvRouter
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    ErrorInfo,
    InstanceInfo,
    KvTransferParams,
    Role,
)
from serving.rpc import RpcClient, RpcServer
from unit.frontend.fake_instances import CARD, collect, request

Script = list[tuple[float, EngineOutput]]


def token(value: int, **more: Any) -> EngineOutput:
    return EngineOutput("r", [value], **more)


def error(kind: str) -> EngineOutput:
    return EngineOutput("r", [], "error", error=ErrorInfo(kind, "why"))


class Worker:
    """Sends the outputs of its script, each so many seconds after the request, and then nothing."""

    def __init__(self, *script: tuple[float, EngineOutput], name: str = "agg-0") -> None:
        self.name, self.script = name, script
        self.asked: list[EngineRequest] = []
        self.released: list[str] = []
        self.aborted = asyncio.Event()
        self.server: RpcServer

    @property
    def role(self) -> Role:
        role: Any = self.name.split("-")[0]
        return role

    def on_generate(self, asked: EngineRequest) -> None:
        self.asked.append(asked)
        for after_s, output in self.script:
            own = msgspec.structs.replace(output, request_id=asked.request_id)
            asyncio.get_running_loop().call_later(after_s, self.server.send, [own])

    def on_abort(self, request_id: str) -> None:
        assert request_id.partition("~")[0] == "r"
        self.aborted.set()

    def on_release(self, request_id: str) -> None:
        self.released.append(request_id)


class Front:
    """The pipeline to some workers, which it asks in turn."""

    def __init__(self, clients: dict[str, RpcClient], deadlines: DeadlinesConfig) -> None:
        self.card, self._clients = CARD, clients
        self.metrics = Metrics()
        process = FrontendSettings(
            topology="any",
            disaggregated="decode-0" in clients,
            model_name="m",
            frontend=FrontendConfig(),
            router=RouterConfig(policy="round_robin", local_prefill_tokens=0),
            deadlines=deadlines,
            control=ControlServices(
                namespace="n", etcd_endpoint="", lease_s=10, nats_url="", nats_token_file=""
            ),
            ready_file="",
        )
        self.router = KvRouter(process.router, model="m")
        for client in clients.values():
            self.router.add_instance(client.info)
        instances: Any = self
        self.pipeline = Pipeline(process, self.router, instances, self.metrics)

    def client(self, instance_id: str) -> RpcClient:
        return self._clients[instance_id]

    async def answer(self) -> list[int]:
        async with asyncio.timeout(2):
            return await collect(self.pipeline, request())

    def num_expired(self, phase: str) -> int:
        page = self.metrics.render().decode()
        head = f'serving_deadlines_exceeded_total{{phase="{phase}"}} '
        [line] = [line for line in page.splitlines() if line.startswith(head)]
        return int(float(line.removeprefix(head)))

    def distrusted(self) -> list[str]:
        return [one.info.instance_id for one in self.router.state() if one.breaker != "closed"]


@asynccontextmanager
async def front_of(path: Path, *workers: Worker, **deadlines: float) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        clients = {}
        for worker in workers:
            worker.server = RpcServer(worker, worker.name, 1)
            addresses = await worker.server.start("127.0.0.1", str(path / f"{worker.name}.sock"))
            stack.push_async_callback(worker.server.close)
            info = InstanceInfo(worker.name, 1, worker.role, addresses, "", CARD, 64, 8, 1, "h")
            client = clients[worker.name] = RpcClient(info, merge=True)
            await client.connect()
            stack.push_async_callback(client.close)
        yield Front(clients, msgspec.structs.replace(DeadlinesConfig(), **deadlines))


@pytest.mark.parametrize(
    ("num_outputs", "deadlines", "kind", "words", "phase", "is_distrusted"),
    [
        (
            0,
            {"prefill_s": 0.1},
            DeadlineExceeded,
            r"prefill ran past its deadline of 0.1 s \(`deadlines.prefill_s`\)",
            "prefill",
            True,
        ),
        (
            0,
            {"first_token_s": 0.1},
            DeadlineExceeded,
            r"first token ran past its deadline of 0.1 s \(`deadlines.first_token_s`\)",
            "first_token",
            False,
        ),
        (
            0,
            {"first_token_s": 0.15, "prefill_s": 0.1},
            DeadlineExceeded,
            "prefill ran past",
            "prefill",
            True,
        ),
        (2, {"token_s": 0.1}, InstanceLost, "silent for 0.1 s", "token", True),
        (
            2,
            {"total_s": 0.2},
            DeadlineExceeded,
            r"total ran past its deadline of 0.2 s \(`deadlines.total_s`\)",
            "total",
            False,
        ),
    ],
)
async def test_silence_is_ended_by_its_deadline(
    tmp_path: Path,
    num_outputs: int,
    deadlines: Any,
    kind: Any,
    words: str,
    phase: str,
    is_distrusted: bool,
) -> None:
    worker = Worker(*((0.02 * number, token(number)) for number in range(num_outputs)))
    async with front_of(tmp_path, worker, **deadlines) as front:
        with pytest.raises(kind, match=words):
            await front.answer()
        await asyncio.wait_for(worker.aborted.wait(), 1)
        assert bool(front.distrusted()) is is_distrusted
        phases = ("queue", "prefill", "first_token", "token", "total")
        assert {one: front.num_expired(one) for one in phases} == {
            one: int(one == phase) for one in phases
        }


# --- the first token ---------------------------------------------------------------------------


async def test_first_token_has_one_deadline_for_all_attempts(tmp_path: Path) -> None:
    busy, silent = Worker((0.4, error("Overloaded"))), Worker(name="agg-1")
    loop = asyncio.get_running_loop()
    async with front_of(tmp_path, busy, silent, first_token_s=0.5) as front:
        began = loop.time()
        with pytest.raises(DeadlineExceeded, match="first token"):
            await front.answer()
        assert 0.49 < loop.time() - began < 0.85
        assert len(busy.asked) == len(silent.asked) == 1
        await asyncio.wait_for(silent.aborted.wait(), 1)
        assert front.distrusted() == [], "it had a fifth of the time"
        assert front.num_expired("first_token") == 1


async def test_lost_instance_does_not_put_the_first_token_off(tmp_path: Path) -> None:
    dying, silent = Worker(), Worker(name="agg-1")
    loop = asyncio.get_running_loop()
    async with front_of(tmp_path, dying, silent, first_token_s=0.5) as front:
        began = loop.time()
        answer = asyncio.create_task(front.answer())
        await asyncio.sleep(0.4)
        await dying.server.close()
        with pytest.raises(DeadlineExceeded, match="first token"):
            await answer
        assert loop.time() - began < 0.85
        assert len(silent.asked) == 1


async def test_after_the_first_token_its_deadline_does_not_matter(tmp_path: Path) -> None:
    worker = Worker((0.0, token(1)), (0.4, token(2)), (0.5, token(3, finish_reason="stop")))
    async with front_of(tmp_path, worker, first_token_s=0.3) as front:
        assert await front.answer() == [1, 2, 3]
        assert front.num_expired("first_token") == 0


async def test_answer_that_goes_on_elsewhere_has_had_its_first_token(tmp_path: Path) -> None:
    first = Worker((0.0, token(1)), (0.05, error("Overloaded")))
    second = Worker((0.4, token(2, finish_reason="stop")), name="agg-1")
    async with front_of(tmp_path, first, second, first_token_s=0.3) as front:
        assert await front.answer() == [1, 2]
        assert [asked.queue_s for asked in first.asked] == [60.0]
        assert [asked.queue_s for asked in second.asked] == [None], "it is not dropped any more"


@pytest.mark.parametrize("is_early", [False, True])
async def test_decode_is_not_held_to_the_deadline_of_the_first_token(
    tmp_path: Path, is_early: bool
) -> None:
    """Neither one that follows the first token nor one that is started before it."""
    params = KvTransferParams("prefill-0", 1, "", "r", "", 3, 1, "")
    offers: Script = [(0.0, EngineOutput("r", [], kv_transfer_params=params))] if is_early else []
    last = token(7, finish_reason="length", kv_transfer_params=params)
    prefill = Worker(*offers, (0.05, last), name="prefill-0")
    decode = Worker((0.5, token(8, finish_reason="length")), name="decode-0")
    async with front_of(tmp_path, prefill, decode, first_token_s=0.3) as front:
        assert await front.answer() == [7, 8]
        assert [asked.follows_prefill for asked in decode.asked] == [is_early]
        assert [asked.queue_s for asked in prefill.asked + decode.asked] == [60.0, None]


async def test_prefill_is_held_to_the_deadline_of_the_first_token(tmp_path: Path) -> None:
    params = KvTransferParams("prefill-0", 1, "", "r", "", 3, 1, "")
    offer = (0.0, EngineOutput("r", [], kv_transfer_params=params))
    prefill, decode = Worker(offer, name="prefill-0"), Worker(name="decode-0")
    async with front_of(tmp_path, prefill, decode, first_token_s=0.15) as front:
        with pytest.raises(DeadlineExceeded, match="first token"):
            await front.answer()
        for worker in (prefill, decode):
            await asyncio.wait_for(worker.aborted.wait(), 1)
        assert front.num_expired("first_token") == 1


# --- the queue ---------------------------------------------------------------------------------


async def test_after_one_queue_another_worker_is_tried(tmp_path: Path) -> None:
    full = Worker((0.0, error("QueuedTooLong")))
    free = Worker((0.0, token(1, finish_reason="stop")), name="agg-1")
    async with front_of(tmp_path, full, free, queue_s=5.0) as front:
        assert await front.answer() == [1]
        assert [asked.queue_s for asked in full.asked + free.asked] == [5.0, 5.0]
        assert front.distrusted() == [], "busy is not broken"
        assert front.num_expired("queue") == 1


async def test_after_two_queues_the_caller_is_told(tmp_path: Path) -> None:
    workers = [Worker((0.0, error("QueuedTooLong")), name=f"agg-{i}") for i in range(3)]
    async with front_of(tmp_path, *workers) as front:
        with pytest.raises(QueuedTooLong, match="why"):
            await front.answer()
        assert sum(len(worker.asked) for worker in workers) == 2
        assert front.num_expired("queue") == 2


async def test_without_another_worker_one_queue_is_enough(tmp_path: Path) -> None:
    worker = Worker((0.0, error("QueuedTooLong")))
    async with front_of(tmp_path, worker) as front:
        with pytest.raises(QueuedTooLong):
            await front.answer()
        assert len(worker.asked) == 1


async def test_full_queues_are_still_tried_one_after_the_other(tmp_path: Path) -> None:
    """They answer at once, which costs no time."""
    workers = [Worker((0.0, error("Overloaded")), name=f"agg-{i}") for i in range(4)]
    async with front_of(tmp_path, *workers) as front:
        with pytest.raises(Overloaded):
            await front.answer()
        assert [len(worker.asked) for worker in workers] == [1, 1, 1, 1]
        assert front.num_expired("queue") == 0


async def test_busy_prefill_instance_is_replaced_by_the_decode_instance(tmp_path: Path) -> None:
    prefill = Worker((0.0, error("QueuedTooLong")), name="prefill-0")
    decode = Worker((0.0, token(1, finish_reason="stop")), name="decode-0")
    async with front_of(tmp_path, prefill, decode) as front:
        assert await front.answer() == [1]
        assert [asked.phase for asked in decode.asked] == ["agg"]
        assert prefill.released == []
