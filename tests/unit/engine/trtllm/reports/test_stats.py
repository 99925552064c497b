"""Statistics in TensorRT-LLM's JSON, nulls and all; what a fetch took; one delivery a turn."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.reports.polling import drain, poll_forever
from serving.engine.trtllm.reports.stats import EngineStats, parse_stats
from serving.engine.trtllm.requests.transfer_times import count_transfer
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import BlocksCleared, BlocksRemoved, BlocksStored, EngineOutput, KvEvent

LOAD = LoadReport()


def test_statistics_for_load_reports_are_read() -> None:
    raw = {
        "iter": 3,
        "numActiveRequests": 2,
        "numQueuedRequests": 1,
        "kvCacheStats": {"maxNumBlocks": 64, "usedNumBlocks": 5, "tokensPerBlock": 16},
        "inflightBatchingStats": {"numPausedRequests": 0},
    }
    assert parse_stats(raw, EngineStats()) == EngineStats(1, 64, 5, 16)


@pytest.mark.parametrize(
    "raw", [{}, {"kvCacheStats": None}, {"kvCacheStats": {"maxNumBlocks": None}}]
)
def test_nulls_keep_what_was_known(raw: dict[str, Any]) -> None:
    before = EngineStats(1, 64, 5, 16)
    assert parse_stats(raw, before) == before
    assert parse_stats({"numQueuedRequests": 0} | raw, before).num_queued == 0


def test_fetch_is_counted_in_versions_with_transfer_metrics() -> None:
    stats = KvTransferTotals()
    timing = SimpleNamespace(
        kv_cache_size=100,
        kv_cache_transfer_start=timedelta(seconds=5),
        kv_cache_transfer_end=timedelta(seconds=5.5),
    )
    metrics = SimpleNamespace(timing_metrics=timing)
    count_transfer(stats, SimpleNamespace(request_perf_metrics=metrics))
    assert (stats.kv_bytes_received, stats.kv_transfer_seconds) == (100, 0.5)
    timing.kv_cache_transfer_start, timing.kv_cache_transfer_end = 1.0, 1.25
    count_transfer(stats, SimpleNamespace(request_perf_metrics=metrics))
    assert (stats.kv_bytes_received, stats.kv_transfer_seconds) == (200, 0.75)


@pytest.mark.parametrize(
    "completion",
    [
        SimpleNamespace(),
        SimpleNamespace(request_perf_metrics=None),
        SimpleNamespace(request_perf_metrics=SimpleNamespace(timing_metrics=SimpleNamespace())),
    ],
)
def test_fetch_without_transfer_metrics_is_not_counted(completion: Any) -> None:
    stats = KvTransferTotals()
    count_transfer(stats, completion)
    assert stats == KvTransferTotals()


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[list[EngineOutput], list[KvEvent]]] = []

    def __call__(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        assert load == LOAD
        self.calls.append((outputs, events))


async def test_one_loop_turn_is_one_delivery() -> None:
    told = Told()
    outbox = Outbox(told, lambda: LOAD)
    first, second = EngineOutput("a", [1]), EngineOutput("b", [2])
    outbox.put(first)
    outbox.put_events([BlocksStored(None, [7, 8])])
    outbox.put(second)
    outbox.put_events([BlocksRemoved([8])])
    assert not told.calls
    assert not outbox.delivered
    await asyncio.sleep(0)
    assert told.calls == [([first, second], [BlocksStored(None, [7, 8]), BlocksRemoved([8])])]
    assert outbox.delivered == {7}
    await asyncio.sleep(0)
    assert len(told.calls) == 1


async def test_flush_delivers_at_once_and_nothing_twice() -> None:
    told = Told()
    outbox = Outbox(told, lambda: LOAD)
    outbox.put_events([])
    outbox.flush()
    assert not told.calls
    outbox.put_events([BlocksStored(None, [7]), BlocksCleared()])
    outbox.flush()
    await asyncio.sleep(0)
    assert len(told.calls) == 1
    assert outbox.delivered == set()


class Answers:
    """Ends like the library's, and stays ended until it is told otherwise."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.is_done = False

    def mark_undone(self) -> None:
        self.is_done = False

    def __call__(self, timeout: float) -> "Answers":
        assert timeout > 0
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self.waiting and not self.is_done:
            yield self.waiting.pop(0)
        self.is_done = True


async def test_events_after_the_iterators_end_are_read_all_the_same() -> None:
    answers, taken = Answers(), list[dict[str, Any]]()
    answers.waiting = [{"event_id": 0}, [{"event_id": 1}, {"event_id": 2}]]
    assert await drain(answers, taken.append) == 3
    answers.waiting = [{"event_id": 3}]
    assert await drain(answers, taken.append) == 1
    assert [event["event_id"] for event in taken] == [0, 1, 2, 3]


async def test_polling_survives_a_failure() -> None:
    answers, done = Answers(), asyncio.Event()
    answers.waiting = [{"bad": True}, {"event_id": 1}]

    def take(item: dict[str, Any]) -> None:
        if "bad" in item:
            raise KeyError("event_id")
        done.set()

    task = asyncio.create_task(poll_forever("events", answers, take, lambda: True, failed_s=0.0))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
