"""What every request has in common, however it is served."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import msgspec
import pytest
from serving.protocol import EngineOutput, KvTransferParams
from unit.frontend.fake_instances import request
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over, token
from waiting import until

PARAMS = KvTransferParams("prefill-0", 1, "", "r", "", 3, 1, "")
LAST = (0.0, token(8, finish_reason="length"))
PREFILLED = (0.0, token(7, finish_reason="length", kv_transfer_params=PARAMS))
OFFER = (0.0, EngineOutput("r", [], kv_transfer_params=PARAMS))


EMBEDDED = (0.0, EngineOutput("r", [], "stop", embedding=b"vector"))


@pytest.mark.parametrize("missing", ["", "prefill-0", "decode-0"])
async def test_embedding_is_computed_by_one_worker_of_either_role(
    tmp_path: Path, missing: str
) -> None:
    workers = [ScriptedWorker(EMBEDDED, name=name) for name in ("decode-0", "prefill-0")]
    async with pipeline_over(tmp_path, *workers) as connected:
        for worker in workers:
            if worker.name == missing:
                await worker.server.close()
                await until(
                    lambda: (
                        missing
                        not in [*connected.routable("prefill"), *connected.routable("decode")]
                    )
                )
        prepared = msgspec.structs.replace(request(), pooling="mean")
        [output] = [output async for output in connected.pipeline.generate(prepared)]
    assert output.embedding == b"vector"
    asked = [worker.name for worker in workers if worker.requests]
    assert asked == ["decode-0" if missing == "prefill-0" else "prefill-0"]
    [[message]] = [worker.requests for worker in workers if worker.requests]
    assert (message.phase, message.pooling) == ("agg", "mean")


@pytest.mark.parametrize(
    ("workers", "answer"),
    [
        ([ScriptedWorker(LAST)], [8]),
        (
            [ScriptedWorker(PREFILLED, name="prefill-0"), ScriptedWorker(LAST, name="decode-0")],
            [7, 8],
        ),
        (
            [
                ScriptedWorker(OFFER, PREFILLED, name="prefill-0"),
                ScriptedWorker(LAST, name="decode-0"),
            ],
            [7, 8],
        ),
    ],
    ids=["aggregated", "disaggregated", "early decode"],
)
async def test_requests_leave_nothing_to_the_garbage_collector(
    tmp_path: Path, workers: list[ScriptedWorker], answer: list[int]
) -> None:
    """A collection would stall every stream."""
    async with pipeline_over(tmp_path, *workers) as connected:
        assert await connected.answer() == answer
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await connected.answer()
            await asyncio.sleep(0)
            garbage = gc.collect()
        finally:
            gc.enable()
        assert connected.router.state()[0].load.num_requests == 0
    assert garbage < 20, f"{garbage} objects after 20 requests"
