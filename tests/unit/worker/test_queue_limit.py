"""A request that a busy worker does not begin in time, through all that lies between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from serving.config import DeadlinesConfig
from serving.errors import Overloaded, QueuedTooLong
from serving.protocol import EngineOutput
from unit.engine.torch_rig import generate, greedy, random_prompts, request, save_model
from unit.worker.pair import RunningWorker, running_pair

ROOM = {"kv_cache_tokens": 256, "max_num_batched_tokens": 256}
"""A pool that one long prompt fills."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def fill(worker: RunningWorker) -> None:
    """All of its blocks are held for a decode that does not come."""
    [prompt] = random_prompts([250], seed=7)
    last: EngineOutput | None = None
    asked = request("full", prompt, greedy(5), phase="prefill")
    async with asyncio.timeout(10), worker.client.generate(asked) as outputs:
        async for output in outputs:
            last = output
    assert last is not None
    assert last.finish_reason == "length"


async def test_prompt_goes_to_the_decode_instance_when_its_queue_deadline_expires(
    model: Path,
) -> None:
    [prompt] = random_prompts([90])
    async with running_pair(model, deadlines=DeadlinesConfig(queue_s=0.5), **ROOM) as pair:
        await fill(pair.prefill)
        assert await pair.answer("a", prompt, greedy(8)) == generate(model, prompt, 8)
        assert [asked.phase for asked in pair.decode.asked] == ["agg"]
        assert pair.prefill.engine.load().num_waiting == 0
        pair.prefill.handover.release("full")


async def test_caller_gets_queued_too_long_when_both_instances_are_busy(model: Path) -> None:
    [prompt] = random_prompts([90])
    deadlines = DeadlinesConfig(queue_s=0.5)
    async with running_pair(model, deadlines=deadlines, decode=ROOM, **ROOM) as pair:
        workers = (pair.prefill, pair.decode)
        for worker in workers:
            await fill(worker)
        with pytest.raises(QueuedTooLong, match=r"0.5 s \(`deadlines.queue_s`\)") as caught:
            await pair.answer("a", prompt, greedy(8))
        assert isinstance(caught.value, Overloaded), "503 with Retry-After"
        for worker in workers:
            assert worker.engine.load().num_waiting == 0
            worker.engine.check_integrity()
            worker.handover.release("full")
