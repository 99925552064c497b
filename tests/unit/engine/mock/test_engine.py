"""The mock engine keeps the engines' contract, and without delays it has none."""

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from serving.config import MockConfig
from serving.engine.mock.text import MockText, printable_ids
from serving.errors import EngineFailed, InvalidRequest, ModelError, OperatorError, Overloaded
from serving.protocol import BlocksRemoved, EngineTransferParams, Guide
from unit.engine.mock_rig import (
    EOS,
    INVISIBLE,
    LAYOUT,
    VOCAB,
    Rig,
    VirtualLoop,
    on_virtual_time,
    prompt,
    save_engine,
)

SLOW = MockConfig(prefill_tokens_per_s=1000, step_s=0.01, transfer_bytes_per_s=1e4)


def test_importing_it_loads_no_torch() -> None:
    program = (
        "import sys, serving.worker.__main__, serving.engine.mock.engine\n"
        "print([name for name in ('torch', 'transformers', 'ucxx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_zero_delay_has_no_timers_and_one_turn_a_step(tmp_path: Path) -> None:
    """1000 requests of 32 tokens, 50 at a time: 20 rounds of 32 steps, and hardly a turn more."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with Rig(tmp_path, max_batch_size=50, max_waiting=1000) as rig:
            before = loop.num_turns
            for i in range(1000):
                rig.submit(f"r{i}", [3 + i % 90, 3 + i // 90, 5, 6], 32)
            await rig.end_of(*(f"r{i}" for i in range(1000)))
            assert loop.num_turns - before <= 20 * 32 + 20
            assert loop.num_timers == 0
            assert loop.time() == 0.0
            assert all(len(rig.tokens(f"r{i}")) == 32 for i in range(1000))

    on_virtual_time(main())


def test_zero_delay_lets_others_run_between_steps(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path) as rig:
            rig.submit("long", prompt(8), 200)
            for _ in range(5):
                await asyncio.sleep(0)
            assert rig.outputs["long"]
            rig.submit("short", prompt(8, 2), 2)
            await rig.end_of("short")
            assert "long" not in rig.ended
            await rig.end_of("long")

    on_virtual_time(main())


def test_answer_depends_on_the_prompt_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path) as rig, Rig(tmp_path, SLOW, max_batch_size=2) as other:
            for name, first in (("a", 1), ("b", 2)):
                rig.submit(name, prompt(20, first), 16)
            await rig.end_of("a", "b")
            answer = rig.tokens("a")
            assert answer != rig.tokens("b")
            assert len(set(answer)) > 8
            other.submit("a", prompt(20, 1), 16)
            continued = prompt(20, 1) + answer[:5]
            other.submit("later", continued, 16, num_prompt=20)
            await other.end_of("a", "later")
            assert other.tokens("a") == answer
            assert other.tokens("later") == answer[5:]
            rig.submit("seeded", prompt(20, 1), 16, sampling={"seed": 7})
            await rig.end_of("seeded")
            assert rig.tokens("seeded") != answer

    on_virtual_time(main())


def test_answers_are_visible_text(tmp_path: Path) -> None:
    save_engine(tmp_path)
    ids = printable_ids(tmp_path, VOCAB)
    assert set(ids) == set(range(VOCAB)) - INVISIBLE - {EOS}
    assert set(printable_ids(tmp_path, 50)) == set(range(50)) - INVISIBLE - {EOS}
    text = MockText(ids)
    seed = text.seed([5, 6], None)
    assert {text.token(seed, place) for place in range(2000)} == set(ids)


def test_tokenizer_without_text_is_refused(tmp_path: Path) -> None:
    save_engine(tmp_path)
    with pytest.raises(ModelError, match="no tokens that are text"):
        printable_ids(tmp_path, 3)
    with pytest.raises(ModelError, match="cannot be read"):
        printable_ids(tmp_path / "nowhere", 3)


def test_eviction_takes_the_least_recently_used_blocks_and_reports_them(tmp_path: Path) -> None:
    """A pool of 32 blocks; the rig compares events and snapshot with every step."""

    async def main() -> None:
        async with Rig(tmp_path, kv_cache_tokens=256) as rig:
            for first in (1, 2, 3):
                rig.submit(f"r{first}", prompt(80, first), 1)
                await rig.end_of(f"r{first}")
            rig.submit("again", prompt(80, 1), 1)  # now 2 is the oldest
            rig.submit("r4", prompt(80, 4), 1)
            await rig.end_of("again", "r4")
            assert rig.last("again").cached_tokens == 72
            assert any(isinstance(event, BlocksRemoved) for event in rig.events)
            for first, is_kept in ((1, True), (2, False)):
                rig.submit(f"probe{first}", prompt(80, first), 1)
                await rig.end_of(f"probe{first}")
                assert (rig.last(f"probe{first}").cached_tokens == 72) is is_kept
            assert len(rig.held["device"]) <= 32

    on_virtual_time(main())


def test_evicted_blocks_come_back_from_the_host_in_their_time(tmp_path: Path) -> None:
    timing = MockConfig(
        prefill_tokens_per_s=1000, step_s=0, host_bytes_per_s=float(LAYOUT.block_bytes)
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        host = 64 * LAYOUT.block_bytes
        async with Rig(tmp_path, timing, kv_cache_tokens=256, host_cache_bytes=host) as rig:
            for first in (1, 2, 3, 4):
                rig.submit(f"r{first}", prompt(128, first), 1)
                await rig.end_of(f"r{first}")
            began = loop.time()
            rig.submit("again", prompt(128, 1), 1)
            await rig.end_of("again")
            num_cached = rig.last("again").cached_tokens
            assert num_cached == 120
            # Every block that came back took a second, each token computed a millisecond.
            onloaded = rig.engine.load().onloaded_blocks
            assert onloaded > 0
            assert loop.time() - began == pytest.approx(onloaded + (128 - num_cached) / 1000)
            assert rig.engine.snapshot("host")

    on_virtual_time(main())


def test_preempted_request_says_the_same_as_undisturbed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, kv_cache_tokens=256) as rig:
            names = [f"r{i}" for i in range(4)]
            for i, name in enumerate(names):
                rig.submit(name, prompt(40, i), 60)
            await rig.end_of(*names)
            assert rig.engine.load().preemptions > 0
            crowded = [rig.tokens(name) for name in names]
            for i, name in enumerate(names):
                rig.submit(f"alone-{name}", prompt(40, i), 60)
                await rig.end_of(f"alone-{name}")
                assert rig.tokens(f"alone-{name}") == crowded[i]

    on_virtual_time(main())


@pytest.mark.parametrize(
    ("timing", "after"),
    [(SLOW, s) for s in (0.0, 0.005, 0.03, 0.07)]
    + [(MockConfig(zero_delay=True), num_turns) for num_turns in (1, 3, 10)],
)
def test_abort_in_any_phase_frees_everything(
    tmp_path: Path, timing: MockConfig, after: float
) -> None:
    """Waiting, computing, decoding, held for export, and while its KV is on its way."""

    async def main() -> None:
        async with (
            Rig(tmp_path, timing, max_batch_size=3, max_num_batched_tokens=16) as rig,
            Rig(tmp_path, timing, role="prefill") as source,
        ):
            source.submit("f", prompt(64, 9), 5, phase="prefill")
            await source.end_of("f")
            params = source.last("f").kv_transfer_params
            tokens = prompt(64, 9) + source.tokens("f")
            rig.submit("f", tokens, 5, num_prompt=64, phase="decode", kv_transfer_params=params)
            rig.submit("p", prompt(30, 8), 5, phase="prefill")
            for i in range(4):
                rig.submit(f"r{i}", prompt(30, i), 100)
            for _ in range(int(after)):
                await asyncio.sleep(0)
            await asyncio.sleep(after % 1)
            names = ["f", "p", *(f"r{i}" for i in range(4))]
            for name in names:
                rig.engine.abort(name)
                rig.engine.check_integrity()
            source.engine.abort("f")
            await rig.end_of(*names)
            assert all(rig.last(f"r{i}").finish_reason == "cancelled" for i in range(4))
            await asyncio.sleep(1)  # the step that was under way is over
            for engine in (rig.engine, source.engine):
                engine.check_integrity()
                load = engine.load()
                assert (load.num_running, load.num_waiting, load.active_blocks) == (0, 0, 0)

    on_virtual_time(main())


def test_waiting_for_too_long_is_refused_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, SLOW, max_batch_size=1) as rig:
            rig.submit("long", prompt(8), 200, queue_s=0.001)  # begins at once
            rig.submit("b", prompt(8, 2), 2, queue_s=1.0)
            await asyncio.sleep(0.3)
            rig.submit("c", prompt(8, 3), 2, queue_s=0.5)
            rig.submit("d", prompt(8, 4), 2)
            await rig.end_of("b", "c")
            assert rig.ended == pytest.approx({"b": 1.0, "c": 0.8})
            for name in ("b", "c"):
                error = rig.last(name).error
                assert error is not None
                assert error.kind == "QueuedTooLong"
            await rig.end_of("long", "d")
            assert len(rig.tokens("long")) == 200

    on_virtual_time(main())


def test_release_frees_a_prefill_that_is_never_fetched(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, SLOW, role="prefill") as rig:
            rig.submit("p", prompt(64), 5, phase="prefill")
            await rig.end_of("p")
            assert rig.engine.load().active_blocks == 8
            rig.engine.release("p")
            rig.engine.release("unknown")
            assert rig.engine.load().active_blocks == 0
            rig.submit("p", prompt(64), 5, phase="prefill")  # the id is free again

    on_virtual_time(main())


def test_a_prefill_with_a_whole_answer_has_no_transfer_parameters(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, SLOW, role="prefill") as rig:
            rig.submit("p", prompt(64), 1, phase="prefill")
            await rig.end_of("p")
            assert rig.last("p").kv_transfer_params is None
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert rig.engine.load().active_blocks == 0

    on_virtual_time(main())


def test_kv_of_another_engine_is_computed_here(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, SLOW, role="prefill") as source, Rig(tmp_path, SLOW) as rig:
            source.submit("p", prompt(64), 4, phase="prefill")
            await source.end_of("p")
            params = source.last("p").kv_transfer_params
            assert params is not None
            wrong = [
                msgspec.structs.replace(params, layout="other"),
                msgspec.structs.replace(params, num_tokens=3),
                EngineTransferParams("x", 0, "p", {}),
            ]
            tokens = prompt(64) + source.tokens("p")
            for i, each in enumerate(wrong):
                more = {"phase": "decode", "kv_transfer_params": each, "num_prompt": 64}
                rig.submit(f"d{i}", tokens, 4, **more)
                await rig.end_of(f"d{i}")
                assert len(rig.tokens(f"d{i}")) == 3
            stats = rig.engine.transfers
            assert (
                stats.kv_transfer_failures,
                stats.local_prefill_fallbacks,
                stats.kv_transfers,
            ) == (3, 3, 0)

    on_virtual_time(main())


def test_requests_that_cannot_run_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, max_waiting=2) as rig:
            guide = Guide("regex", "a+")
            for tokens, max_tokens, more in (
                ([], 1, {}),
                (prompt(256), 1, {}),
                ([VOCAB], 1, {}),
                (prompt(4), 1, {"sampling": {"guide": guide}}),
            ):
                with pytest.raises(InvalidRequest):
                    rig.submit("bad", tokens, max_tokens, **more)
            rig.submit("a", prompt(4), 1)
            with pytest.raises(InvalidRequest, match="in use"):
                rig.submit("a", prompt(4), 1)
            rig.submit("b", prompt(4), 1)
            with pytest.raises(Overloaded):
                rig.submit("c", prompt(4), 1)
            await rig.end_of("a", "b")
        with pytest.raises(EngineFailed):
            rig.submit("late", prompt(4), 1)

    on_virtual_time(main())


def test_log_probabilities_come_as_they_were_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, max_num_batched_tokens=16) as rig:
            rig.submit("r", prompt(40), 3, sampling={"logprobs": 2, "prompt_logprobs": 0})
            await rig.end_of("r")
            first, *others = rig.outputs["r"]
            assert first.prompt_logprobs is not None
            assert [each.token_id for each in first.prompt_logprobs] == prompt(40)[1:]
            for output in (first, *others):
                assert output.logprobs is not None
                [logprob] = output.logprobs
                assert [logprob.token_id] == output.token_ids
                assert len({token for token, _ in logprob.top}) == 2

    on_virtual_time(main())


def test_closing_ends_running_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path, SLOW) as rig:
            rig.submit("r", prompt(40), 100)
            await asyncio.sleep(0.1)
        assert rig.last("r").finish_reason == "cancelled"
        told = len(rig.loads)
        await asyncio.sleep(1)
        assert len(rig.loads) == told

    on_virtual_time(main())


def test_embeddings_are_refused_with_the_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(tmp_path) as rig:
            with pytest.raises(InvalidRequest, match="the mock engine computes no embeddings"):
                rig.submit("r", [5], 1, pooling="last")

    on_virtual_time(main())


@pytest.mark.parametrize(
    ("options", "context", "num_tokens"),
    [({}, 4096, 8 * 4096), ({"kv_cache_tokens": 512}, 512, 512)],
)
def test_auto_context_is_the_models_or_what_the_pool_holds(
    tmp_path: Path, options: dict[str, int], context: int, num_tokens: int
) -> None:
    spec = Rig(tmp_path, max_model_len="auto", **options).engine.spec
    assert (spec.max_model_len, spec.num_blocks * spec.block_size) == (context, num_tokens)


def test_pool_too_small_for_one_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="kv_cache_tokens"):
        Rig(tmp_path, kv_cache_tokens=128)
