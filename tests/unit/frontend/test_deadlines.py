"""Workers that are silent, slow or busy: how long the pipeline waits for each phase, and what it
then says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from serving.errors import DeadlineExceeded, InstanceLost, Overloaded, QueuedTooLong
from serving.protocol import (
    EngineOutput,
    KvTransferParams,
)
from unit.frontend.scripted_workers import Script, ScriptedWorker, error, pipeline_over, token


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
async def test_silent_worker_ends_the_request_at_the_deadline(
    tmp_path: Path,
    num_outputs: int,
    deadlines: Any,
    kind: Any,
    words: str,
    phase: str,
    is_distrusted: bool,
) -> None:
    worker = ScriptedWorker(*((0.02 * number, token(number)) for number in range(num_outputs)))
    async with pipeline_over(tmp_path, worker, **deadlines) as connected:
        with pytest.raises(kind, match=words):
            await connected.answer()
        await asyncio.wait_for(worker.aborted.wait(), 1)
        assert bool(connected.distrusted()) is is_distrusted
        phases = ("queue", "prefill", "first_token", "token", "total")
        assert {name: connected.num_expired(name) for name in phases} == {
            name: int(name == phase) for name in phases
        }


# --- the first token ---------------------------------------------------------------------------


async def test_first_token_has_one_deadline_for_all_attempts(tmp_path: Path) -> None:
    busy, silent = ScriptedWorker((0.4, error("Overloaded"))), ScriptedWorker(name="agg-1")
    loop = asyncio.get_running_loop()
    async with pipeline_over(tmp_path, busy, silent, first_token_s=0.5) as connected:
        began = loop.time()
        with pytest.raises(DeadlineExceeded, match="first token"):
            await connected.answer()
        assert 0.49 < loop.time() - began < 0.85
        assert len(busy.requests) == len(silent.requests) == 1
        await asyncio.wait_for(silent.aborted.wait(), 1)
        assert connected.distrusted() == [], "it had a fifth of the time"
        assert connected.num_expired("first_token") == 1


async def test_lost_instance_does_not_extend_the_first_token_deadline(tmp_path: Path) -> None:
    dying, silent = ScriptedWorker(), ScriptedWorker(name="agg-1")
    loop = asyncio.get_running_loop()
    async with pipeline_over(tmp_path, dying, silent, first_token_s=0.5) as connected:
        began = loop.time()
        answer = asyncio.create_task(connected.answer())
        await asyncio.sleep(0.4)
        await dying.server.close()
        with pytest.raises(DeadlineExceeded, match="first token"):
            await answer
        assert loop.time() - began < 0.85
        assert len(silent.requests) == 1


async def test_first_token_deadline_ends_with_the_first_token(tmp_path: Path) -> None:
    worker = ScriptedWorker((0.0, token(1)), (0.4, token(2)), (0.5, token(3, finish_reason="stop")))
    async with pipeline_over(tmp_path, worker, first_token_s=0.3) as connected:
        assert await connected.answer() == [1, 2, 3]
        assert connected.num_expired("first_token") == 0


async def test_answer_continued_elsewhere_has_no_first_token_deadline(tmp_path: Path) -> None:
    first = ScriptedWorker((0.0, token(1)), (0.05, error("Overloaded")))
    second = ScriptedWorker((0.4, token(2, finish_reason="stop")), name="agg-1")
    async with pipeline_over(tmp_path, first, second, first_token_s=0.3) as connected:
        assert await connected.answer() == [1, 2]
        assert [sent.queue_s for sent in first.requests] == [60.0]
        assert [sent.queue_s for sent in second.requests] == [None], "it is not dropped any more"


@pytest.mark.parametrize("is_early", [False, True])
async def test_decode_has_no_first_token_deadline(tmp_path: Path, is_early: bool) -> None:
    """Neither a decode after the first token nor an early decode."""
    params = KvTransferParams("prefill-0", 1, "", "r", "", 3, 1, "")
    offers: Script = [(0.0, EngineOutput("r", [], kv_transfer_params=params))] if is_early else []
    last = token(7, finish_reason="length", kv_transfer_params=params)
    prefill = ScriptedWorker(*offers, (0.05, last), name="prefill-0")
    decode = ScriptedWorker((0.5, token(8, finish_reason="length")), name="decode-0")
    async with pipeline_over(tmp_path, prefill, decode, first_token_s=0.3) as connected:
        assert await connected.answer() == [7, 8]
        assert [sent.follows_prefill for sent in decode.requests] == [is_early]
        assert [sent.queue_s for sent in prefill.requests + decode.requests] == [60.0, None]


async def test_prefill_has_the_first_token_deadline(tmp_path: Path) -> None:
    params = KvTransferParams("prefill-0", 1, "", "r", "", 3, 1, "")
    offer = (0.0, EngineOutput("r", [], kv_transfer_params=params))
    prefill, decode = ScriptedWorker(offer, name="prefill-0"), ScriptedWorker(name="decode-0")
    async with pipeline_over(tmp_path, prefill, decode, first_token_s=0.15) as connected:
        with pytest.raises(DeadlineExceeded, match="first token"):
            await connected.answer()
        for worker in (prefill, decode):
            await asyncio.wait_for(worker.aborted.wait(), 1)
        assert connected.num_expired("first_token") == 1


# --- the queue ---------------------------------------------------------------------------------


async def test_first_queue_timeout_moves_the_request_to_another_worker(tmp_path: Path) -> None:
    full = ScriptedWorker((0.0, error("QueuedTooLong")))
    free = ScriptedWorker((0.0, token(1, finish_reason="stop")), name="agg-1")
    async with pipeline_over(tmp_path, full, free, queue_s=5.0) as connected:
        assert await connected.answer() == [1]
        assert [sent.queue_s for sent in full.requests + free.requests] == [5.0, 5.0]
        assert connected.distrusted() == [], "busy is not broken"
        assert connected.num_expired("queue") == 1


async def test_second_queue_timeout_fails_the_request(tmp_path: Path) -> None:
    workers = [ScriptedWorker((0.0, error("QueuedTooLong")), name=f"agg-{i}") for i in range(3)]
    async with pipeline_over(tmp_path, *workers) as connected:
        with pytest.raises(QueuedTooLong, match="why"):
            await connected.answer()
        assert sum(len(worker.requests) for worker in workers) == 2
        assert connected.num_expired("queue") == 2


async def test_first_queue_timeout_fails_the_request_without_another_worker(tmp_path: Path) -> None:
    worker = ScriptedWorker((0.0, error("QueuedTooLong")))
    async with pipeline_over(tmp_path, worker) as connected:
        with pytest.raises(QueuedTooLong):
            await connected.answer()
        assert len(worker.requests) == 1


async def test_workers_with_full_queues_are_tried_one_after_the_other(tmp_path: Path) -> None:
    """They answer at once, which costs no time."""
    workers = [ScriptedWorker((0.0, error("Overloaded")), name=f"agg-{i}") for i in range(4)]
    async with pipeline_over(tmp_path, *workers) as connected:
        with pytest.raises(Overloaded):
            await connected.answer()
        assert [len(worker.requests) for worker in workers] == [1, 1, 1, 1]
        assert connected.num_expired("queue") == 0


async def test_busy_prefill_instance_is_replaced_by_the_decode_instance(tmp_path: Path) -> None:
    prefill = ScriptedWorker((0.0, error("QueuedTooLong")), name="prefill-0")
    decode = ScriptedWorker((0.0, token(1, finish_reason="stop")), name="decode-0")
    async with pipeline_over(tmp_path, prefill, decode) as connected:
        assert await connected.answer() == [1]
        assert [sent.phase for sent in decode.requests] == ["agg"]
        assert prefill.released == []
