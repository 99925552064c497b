"""A long prompt's blocks are fetched while the prompt is still being computed, and whatever breaks
in between costs time only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from serving.engine.torch.runner import ModelRunner
from serving.errors import EngineFailed, Overloaded, ServingError
from serving.protocol import EngineRequest
from serving.text.preprocess import PreparedRequest
from unit.engine.torch_rig import generate, greedy, random_prompts, save_model
from unit.worker.pair import running_pair
from waiting import until

NUM_TOKENS = 8
LENGTH = 90  # six chunks of 16 tokens, twelve blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def step_gate(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[int], None]]:
    """Functions called in the compute thread before each step, with the tokens of its chunks."""
    called: list[Callable[[int], None]] = []
    launch = ModelRunner.launch

    def gated(self: ModelRunner, chunks: Any) -> Any:
        for function in called:
            function(sum(chunk.length for chunk in chunks))
        return launch(self, chunks)

    monkeypatch.setattr(ModelRunner, "launch", gated)
    return called


def slow_prefill(pause_s: float = 0.03) -> Callable[[int], None]:
    """Steps with prompt tokens take so much longer, so that what overlaps has the time to."""
    return lambda num_tokens: time.sleep(pause_s) if num_tokens >= 8 else None


@pytest.mark.parametrize("length", [33, 80, 90, 96])
async def test_tokens_are_the_same_and_most_blocks_come_before_the_first_one(
    model: Path, step_gate: list[Callable[[int], None]], length: int
) -> None:
    [prompt] = random_prompts([length])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        early = 0

        async def look() -> None:
            nonlocal early
            while not any(output.token_ids for output in pair.prefill.told):
                early = pair.decode.pulled
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(look())
        assert await pair.answer("a", prompt, greedy(NUM_TOKENS)) == generate(
            model, prompt, NUM_TOKENS
        )
        await watching
        layout = pair.decode.engine.spec.kv_layout
        assert layout is not None
        assert pair.decode.pulled == layout.num_blocks(length) * layout.block_bytes
        full_chunks = (length - 1) // 16
        assert early >= (full_chunks - 1) * 2 * layout.block_bytes
        stats = pair.decode.handover.transfers
        assert (stats.kv_transfers, stats.kv_transfer_failures, stats.local_prefill_fallbacks) == (
            1,
            0,
            0,
        )


async def test_short_prompts_and_switched_off_overlap_fetch_nothing_early(model: Path) -> None:
    short, long = random_prompts([14, LENGTH])
    for prompt, options in [(short, {}), (long, {"overlap": False})]:
        async with running_pair(model, **options) as pair:
            expected = generate(model, prompt, NUM_TOKENS)
            assert await pair.answer("a", prompt, greedy(NUM_TOKENS)) == expected
            assert pair.decode.handover.transfers.kv_transfers == 1
            assert not any(asked.follows_prefill for asked in pair.decode.asked)


async def test_many_at_once_with_hits_on_both_sides(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    prompts = random_prompts([90, 60, 120, 33, 100])
    prompts += [[*prompts[0][:64], *prompts[1]], prompts[2]]
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    step_gate.append(slow_prefill(0.003))
    async with running_pair(model) as pair:
        for turn in "ab":
            got = await asyncio.gather(
                *(
                    pair.answer(f"{turn}{index}", prompt, greedy(NUM_TOKENS))
                    for index, prompt in enumerate(prompts)
                )
            )
            assert got == expected
        assert pair.decode.handover.transfers.local_prefill_fallbacks == 0


async def test_a_prefill_preempted_while_it_is_fetched_starts_over(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    """An older request of the prefill worker grows, and takes the blocks that are being fetched."""
    prompt, other = random_prompts([220, 16], seed=3)  # 28 of 32 blocks, and 3 that become more
    step_gate.append(slow_prefill(0.005))
    async with running_pair(model, kv_cache_tokens=256, max_num_batched_tokens=8) as pair:
        older = EngineRequest("older", other, len(other), greedy(110))
        async with pair.prefill.client.generate(older) as outputs:
            await anext(outputs)
            answering = asyncio.create_task(pair.answer("a", prompt, greedy(NUM_TOKENS)))
            async for _ in outputs:
                pass
        assert await answering == generate(model, prompt, NUM_TOKENS)
        assert pair.decode.handover.transfers.local_prefill_fallbacks == 0
        assert pair.prefill.engine.load().preemptions > 0


async def test_an_answer_of_one_token_leaves_no_offer_or_fetch_behind(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    [prompt] = random_prompts([LENGTH])
    [first] = generate(model, prompt, 1)
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        assert await pair.answer("a", prompt, greedy(NUM_TOKENS, stop_token_ids=[first])) == []
        assert await pair.answer("b", prompt, greedy(1)) == [first]
        await until(lambda: pair.decode.handover.num_fetching == 0)
        assert pair.decode.handover.transfers.kv_transfers == 0


@pytest.mark.parametrize("num_outputs", [0, 1, 3])
async def test_a_disconnect_at_any_time_leaves_no_offer_or_fetch_behind(
    model: Path, step_gate: list[Callable[[int], None]], num_outputs: int
) -> None:
    [prompt] = random_prompts([LENGTH])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        prepared = PreparedRequest("a", list(prompt), greedy(100))
        if num_outputs == 0:
            task = asyncio.create_task(pair.answer("a", prompt, greedy(100)))
            await until(lambda: pair.decode.pulled > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with aclosing(pair.pipeline.generate(prepared)) as outputs:
                for _ in range(num_outputs):
                    await anext(outputs)
        await pair.check_nothing_is_left()
        expected = generate(model, prompt, NUM_TOKENS)
        assert await pair.answer("b", prompt, greedy(NUM_TOKENS)) == expected


async def test_a_transfer_that_breaks_midway_is_repeated_once_the_first_token_is_known(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    [prompt] = random_prompts([LENGTH])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        read, broken = pair.prefill.engine.kv.read, asyncio.Event()

        def break_once(request_id: str, first: int, out: Any) -> None:
            if first >= 4 and not broken.is_set():
                broken.set()
                raise OSError("the source is out of order")
            read(request_id, first, out)

        pair.prefill.engine.kv.read = break_once  # type: ignore[method-assign]
        expected = generate(model, prompt, NUM_TOKENS)
        assert await pair.answer("a", prompt, greedy(NUM_TOKENS)) == expected
        assert broken.is_set()
        stats = pair.decode.handover.transfers
        assert (stats.kv_transfers, stats.kv_transfer_failures, stats.local_prefill_fallbacks) == (
            1,
            1,
            0,
        )


@pytest.mark.parametrize("error", [Overloaded("full"), EngineFailed("a hiccup")])
async def test_a_decode_that_cannot_start_early_costs_no_request(
    model: Path, step_gate: list[Callable[[int], None]], error: ServingError
) -> None:
    [prompt] = random_prompts([LENGTH])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        submit = pair.decode.worker.on_generate
        refused = asyncio.Event()

        def refuse_to_follow(request: Any) -> None:
            if request.follows_prefill:
                refused.set()
                raise error
            submit(request)

        pair.decode.worker.on_generate = refuse_to_follow  # type: ignore[method-assign]
        expected = generate(model, prompt, NUM_TOKENS)
        assert await pair.answer("a", prompt, greedy(NUM_TOKENS)) == expected
        assert refused.is_set()


async def test_a_failed_prefill_ends_its_early_decode_and_is_computed_elsewhere(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    [prompt] = random_prompts([LENGTH])
    steps: list[int] = []

    def fail_at_the_fourth(num_tokens: int) -> None:
        if num_tokens > 8:
            steps.append(num_tokens)
            if len(steps) == 4:
                raise RuntimeError("a step that fails")

    step_gate += [slow_prefill(), fail_at_the_fourth]
    async with running_pair(model) as pair:
        expected = generate(model, prompt, NUM_TOKENS)
        assert await pair.answer("a", prompt, greedy(NUM_TOKENS)) == expected
        assert len(steps) >= 4
        await pair.check_nothing_is_left()


async def test_lost_prefill_instance_is_replaced_by_the_decode_instance(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    [prompt] = random_prompts([LENGTH])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        task = asyncio.create_task(pair.answer("a", prompt, greedy(NUM_TOKENS)))
        await until(lambda: pair.decode.pulled > 0)
        await pair.prefill.worker.rpc.close()
        assert await task == generate(model, prompt, NUM_TOKENS)


async def test_lost_decode_instance_is_replaced_by_the_prefill_instance(
    model: Path, step_gate: list[Callable[[int], None]]
) -> None:
    [prompt] = random_prompts([LENGTH])
    step_gate.append(slow_prefill())
    async with running_pair(model) as pair:
        task = asyncio.create_task(pair.answer("a", prompt, greedy(NUM_TOKENS)))
        await until(lambda: pair.decode.pulled > 0)
        await pair.decode.worker.rpc.close()
        assert await task == generate(model, prompt, NUM_TOKENS)
