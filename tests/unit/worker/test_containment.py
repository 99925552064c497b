"""What goes wrong with one request ends that request at most."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving.kv_transfer import pace
from serving.protocol import EngineOutput
from unit.engine.torch_rig import generate, greedy, random_prompts, save_model
from unit.worker.pair import running_pair

NUM_TOKENS = 8
LENGTH = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def test_unexpected_exception_in_a_fetch_costs_neither_the_worker_nor_the_request(
    model: Path,
) -> None:
    prompts = random_prompts([LENGTH, LENGTH + 1])
    async with running_pair(model, overlap=False) as pair:
        transfer = pair.decode.handover._transfer
        pull, broken = transfer.pull, asyncio.Event()

        async def break_once(*args: Any, **options: Any) -> int:
            num_bytes = await pull(*args, **options)
            if not broken.is_set():
                broken.set()
                raise ZeroDivisionError("a mistake of ours")
            return num_bytes

        transfer.pull = break_once  # type: ignore[method-assign]
        answers = await asyncio.gather(
            *(pair.answer(f"r{i}", prompt, greedy(NUM_TOKENS)) for i, prompt in enumerate(prompts))
        )
        assert answers == [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
        totals = pair.decode.handover.transfers
        assert (totals.kv_transfer_failures, totals.local_prefill_fallbacks) == (1, 1)


async def test_fetch_from_a_source_that_stops_ends_long_before_the_configured_deadline(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LEAST_S", 0.2)
    prompts = random_prompts([LENGTH, LENGTH + 1])
    async with running_pair(model, overlap=False, hold_s=2.0) as pair:
        await pair.answer("first", prompts[0], greedy(NUM_TOKENS))
        read, released = pair.prefill.engine.kv.read, threading.Event()

        def wait_and_read(*args: Any) -> None:
            released.wait(20)
            read(*args)

        pair.prefill.engine.kv.read = wait_and_read  # type: ignore[method-assign]
        began = time.monotonic()
        answer = await pair.answer("second", prompts[1], greedy(NUM_TOKENS))
        assert time.monotonic() - began < 10, "transfer_s is 30 s"
        released.set()
        assert answer == generate(model, prompts[1], NUM_TOKENS)
        assert pair.decode.handover.transfers.local_prefill_fallbacks == 1


async def test_output_that_cannot_be_handed_over_ends_its_own_request_only(model: Path) -> None:
    prompts = random_prompts([LENGTH, LENGTH + 1])
    async with running_pair(model, overlap=False) as pair:
        endpoint = pair.prefill.handover._prefill
        on_output = endpoint.on_output
        broken: list[str] = []

        def break_one(output: EngineOutput) -> EngineOutput | None:
            if output.request_id.startswith("bad") and not broken:
                broken.append(output.request_id)
                raise ZeroDivisionError("a mistake of ours")
            return on_output(output)

        endpoint.on_output = break_one  # type: ignore[method-assign]
        good, bad = await asyncio.gather(
            pair.answer("good", prompts[0], greedy(NUM_TOKENS)),
            pair.answer("bad", prompts[1], greedy(NUM_TOKENS)),
        )
        assert broken == ["bad"]
        assert good == generate(model, prompts[0], NUM_TOKENS)
        # It was tried once more, elsewhere.
        assert bad == generate(model, prompts[1], NUM_TOKENS)
