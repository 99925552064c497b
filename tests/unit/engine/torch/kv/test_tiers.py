"""The torch engine with a host tier, and with KV in a narrower dtype than its weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from serving.engine.torch.engine import TorchEngine
from serving.engine.torch.kv.pool import KvPool
from serving.errors import OperatorError
from serving.kv_layout import KvLayout
from serving.kv_router.event_stream import IndexCounters, KvEventStream
from serving.kv_router.prefix_index import PrefixIndex
from serving.protocol import BlocksStored, KvEventBatch
from transformers import LlamaConfig
from unit.engine.torch_rig import (
    SIZES,
    Sink,
    generate,
    greedy,
    make_engine,
    random_prompts,
    request,
    running,
    save_model,
    settled,
)

NUM_TOKENS = 12
BLOCK_BYTES = 2 * 2 * 8 * 2 * 16 * 4  # of the rig's model in float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


# --- host tier -----------------------------------------------------------------------------------


async def test_evicted_prompts_are_found_on_the_host(model: Path) -> None:
    """Five prompts, of which the pool holds one or two; every one comes back as it was."""
    prompts = random_prompts([40, 70, 61, 33, 90])
    options = {"kv_cache_tokens": 128, "host_cache_bytes": 100 * BLOCK_BYTES}
    index, num_heard, num_batches = PrefixIndex(), 0, 0
    router = KvEventStream(index, "w0", IndexCounters())
    async with running(model, **options) as (engine, sink):
        for turn in "abc":
            for i, prompt in enumerate(prompts):
                engine.submit(request(f"{turn}{i}", prompt, greedy(NUM_TOKENS)))
                await sink.finished(f"{turn}{i}")
                num_batches += 1
                router.on_batch(KvEventBatch("w0", 1, num_batches, sink.events[num_heard:]))
                num_heard = len(sink.events)
                for tier in ("device", "host"):
                    assert index.blocks("w0", tier) == set(engine.snapshot(tier))
        load = engine.load()
        assert load.num_host_blocks == 100
        assert load.host_cached_blocks == len(engine.snapshot("host")) > 20
        assert load.onloaded_blocks > 0
        assert len(engine.snapshot()) <= 16
        # Copied once each: what came back and was not changed stays where it was.
        assert load.offloaded_blocks == len(sink.held["host"])
    for i, prompt in enumerate(prompts):
        expected = generate(model, prompt, NUM_TOKENS)
        assert [sink.tokens[f"{turn}{i}"] for turn in "abc"] == [expected] * 3
        found = (len(prompt) - 1) // 8 * 8
        assert [sink.cached[f"{turn}{i}"] for turn in "abc"] == [0, found, found]
    assert any(isinstance(e, BlocksStored) and e.tier == "host" for e in sink.events)


async def test_a_cached_prompt_is_computed_again_for_its_logprobs(model: Path) -> None:
    prompt, other = random_prompts([60, 100])
    options = {"kv_cache_tokens": 128, "host_cache_bytes": 64 * BLOCK_BYTES}
    async with running(model, **options) as (engine, sink):
        for name, tokens in (("a", prompt), ("other", other)):
            engine.submit(request(name, tokens, greedy(1)))
            await sink.finished(name)
        engine.submit(request("again", prompt, greedy(1, prompt_logprobs=0)))
        await sink.finished("again")
        assert sink.cached["again"] == 0
        assert len(sink.prompt_logprobs["again"]) == 59


async def test_a_small_host_tier_keeps_the_latest_evictions(model: Path) -> None:
    prompts = random_prompts([65, 66, 67])
    options = {"kv_cache_tokens": 128, "host_cache_bytes": 9 * BLOCK_BYTES}
    async with running(model, **options) as (engine, sink):
        for turn in "ab":
            for i, prompt in enumerate(prompts):
                engine.submit(request(f"{turn}{i}", prompt, greedy(2)))
                await sink.finished(f"{turn}{i}")
                assert engine.load().host_cached_blocks <= 9
    for i, prompt in enumerate(prompts):
        expected = generate(model, prompt, 2)
        assert [sink.tokens[f"{turn}{i}"] for turn in "ab"] == [expected] * 2


@pytest.mark.parametrize("host_blocks", [0, 3, 64])
async def test_want_of_blocks_preempts_and_never_fails(model: Path, host_blocks: int) -> None:
    """Six requests grow in a pool with room for two; all finish as if each were alone."""
    prompts = random_prompts([30, 28, 31, 17, 25, 9], seed=4)
    options = {
        "max_model_len": 80,
        "kv_cache_tokens": 104,
        "host_cache_bytes": host_blocks * BLOCK_BYTES,
    }
    names = [str(i) for i in range(len(prompts))]
    async with running(model, **options) as (engine, sink):
        for name, prompt in zip(names, prompts, strict=True):
            engine.submit(request(name, prompt, greedy(40)))
        await sink.finished(*names)
        assert engine.load().preemptions > 0
    for name, prompt in zip(names, prompts, strict=True):
        assert sink.last[name].finish_reason == "length"
        assert sink.tokens[name] == generate(model, prompt, 40)


async def test_many_requests_and_aborts_keep_both_tiers_consistent(model: Path) -> None:
    prompts = random_prompts([5, 60, 33, 12, 48, 7, 25, 40] * 4, seed=3)
    prompts = [prompts[i % 5][:16] + p for i, p in enumerate(prompts)]
    prompts += prompts[:16]
    options = {
        "kv_cache_tokens": 256,
        "max_num_batched_tokens": 40,
        "host_cache_bytes": 24 * BLOCK_BYTES,
        "max_waiting": 64,
    }
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(20)))
        for i in range(0, len(prompts), 5):
            await asyncio.sleep(0.01)
            engine.abort(str(i))
            engine.check_integrity()
            for tier, hashes in sink.held.items():
                assert set(engine.snapshot(tier)) == hashes
        await sink.finished(*map(str, range(len(prompts))))
        assert engine.load().onloaded_blocks > 0
    for i, prompt in enumerate(prompts):
        if sink.last[str(i)].finish_reason == "length":
            assert sink.tokens[str(i)] == generate(model, prompt, 20)


async def test_a_transfer_writes_only_after_the_old_content_is_copied(model: Path) -> None:
    """A decode worker: its pool is full of cached blocks, which a fetched prompt evicts."""
    kept, prompt = random_prompts([100, 90], seed=8)
    options = {"kv_cache_tokens": 128, "host_cache_bytes": 64 * BLOCK_BYTES}
    async with running(model) as (source, told), running(model, **options) as (target, sink):
        target.submit(request("kept", kept, greedy(NUM_TOKENS)))
        await sink.finished("kept")
        source.submit(request("r", prompt, greedy(NUM_TOKENS), phase="prefill"))
        await told.finished("r")
        layout = source.spec.kv_layout
        assert layout is not None
        staging = bytearray(source.kv.exported("r") * layout.block_bytes)
        source.kv.read("r", 0, staging)
        source.kv.release("r")
        tokens = prompt + told.tokens["r"]
        sampling = greedy(NUM_TOKENS)
        follow = request("r", tokens, sampling, num_prompt_tokens=90, phase="decode")
        async with target.kv.reserve(follow) as reservation:
            reservation.write(0, staging)
            reservation.commit()
        await sink.finished("r")
        target.submit(request("kept again", kept, greedy(NUM_TOKENS)))
        await sink.finished("kept again")
        assert sink.cached["kept again"] == 96
        # And the fetched prompt comes back from the host, so that less is fetched.
        follow = request("s", tokens, sampling, num_prompt_tokens=90, phase="decode")
        async with target.kv.reserve(follow) as reservation:
            assert (reservation.first_block, reservation.num_blocks) == (11, 1)
            reservation.write(11, memoryview(staging)[11 * layout.block_bytes :])
            reservation.commit()
        await sink.finished("s")
    assert sink.tokens["kept again"] == sink.tokens["kept"] == generate(model, kept, NUM_TOKENS)
    expected = generate(model, prompt, NUM_TOKENS)
    assert told.tokens["r"] + sink.tokens["r"] == expected
    assert told.tokens["r"] + sink.tokens["s"] == expected


async def test_no_host_tier_where_computing_is_cheaper(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "serving.engine.torch.kv.host_blocks.HostBlocks.onload_s", lambda self: 1000.0
    )
    async with running(model, host_cache_bytes=64 * BLOCK_BYTES) as (engine, _):
        assert engine.load().num_host_blocks == 0
    assert "computing is cheaper" in caplog.text


async def test_too_small_a_host_tier_is_refused_at_start(model: Path) -> None:
    with pytest.raises(OperatorError, match=r"engine\.host_cache_bytes"):
        async with running(model, host_cache_bytes=100):
            pass


async def test_failing_copies_end_the_engine_instead_of_giving_wrong_tokens(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts([60, 90])
    engine = make_engine(model, kv_cache_tokens=128, host_cache_bytes=64 * BLOCK_BYTES)
    sink = Sink()
    await engine.start(sink)

    def fail(self: object, copies: object) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr("serving.engine.torch.kv.host_blocks.HostBlocks.run", fail)
    for name, prompt in zip("ab", prompts, strict=True):
        engine.submit(request(name, prompt, greedy(1)))
        await sink.finished(name)
    assert sink.last["a"].finish_reason == "length"
    error = sink.last["b"].error
    assert error is not None
    assert "no such memory" in error.message
    await engine.close()


# --- KV dtype ------------------------------------------------------------------------------------

# Largest difference of log-probabilities that rounding explains: 8 and 4 significant bits.
TOLERANCE = {"bfloat16": 0.02, "float8_e4m3fn": 0.4}


async def top_logprobs(
    sink: Sink, engine: TorchEngine, name: str, prompt: list[int]
) -> dict[int, float]:
    engine.submit(request(name, prompt, greedy(1, logprobs=20)))
    await sink.finished(name)
    return dict(sink.logprobs[name][0].top)


@pytest.mark.parametrize("dtype", TOLERANCE)
async def test_narrow_kv_is_close_and_does_not_depend_on_the_cache(
    dtype: str, tmp_path: Path
) -> None:
    """Cold in one chunk, cold in many, from the device's cache and from the host: all the same."""
    model = save_model(tmp_path / "model", LlamaConfig(**{**SIZES, "initializer_range": 0.15}))
    prompt, other = random_prompts([60, 100])
    async with running(model) as (engine, sink):
        exact = await top_logprobs(sink, engine, "exact", prompt)
        assert engine.spec.kv_layout is not None
        exact_layout = engine.spec.kv_layout
    narrow = []
    options = {"kv_cache_dtype": dtype, "kv_cache_tokens": 128, "host_cache_bytes": 2**20}
    for budget in (256, 16):
        async with running(model, max_num_batched_tokens=budget, **options) as (engine, sink):
            layout = engine.spec.kv_layout
            assert layout is not None
            assert layout.dtype == dtype
            assert layout.fingerprint != exact_layout.fingerprint
            narrow.append(await top_logprobs(sink, engine, "cold", prompt))
            narrow.append(await top_logprobs(sink, engine, "again", prompt))
            engine.submit(request("other", other, greedy(1)))
            await sink.finished("other")  # which takes nearly all blocks
            narrow.append(await top_logprobs(sink, engine, "from the host", prompt))
            assert sink.cached["from the host"] == sink.cached["again"] == 56
            assert engine.load().onloaded_blocks > 0
    for each in narrow[1:]:
        assert each == pytest.approx(narrow[0], abs=1e-4)
    shared = exact.keys() & narrow[0].keys()
    assert len(shared) >= 15
    differences = [abs(exact[token] - narrow[0][token]) for token in shared]
    assert 1e-5 < max(differences) < TOLERANCE[dtype]


async def test_narrow_kv_decodes_and_resumes_after_preemption(model: Path) -> None:
    prompts = random_prompts([30, 28, 31])
    alone: list[list[int]] = []
    options = {"max_model_len": 64, "kv_cache_dtype": "bfloat16"}
    async with running(model, kv_cache_tokens=1024, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(33)))
            await sink.finished(str(i))
            alone.append(sink.tokens[str(i)])
    async with running(model, kv_cache_tokens=104, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(33)))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
        await settled(engine)
    assert [sink.tokens[str(i)] for i in range(3)] == alone


def test_float8_saturates_and_keeps_representable_values() -> None:
    kv = KvPool(KvLayout.uniform(1, 1, 4, 8, "float8_e4m3fn"), 2, "cpu")
    values = torch.tensor([[[0.0, 1e9, -1e9, 1.0625]]])  # [T, Hkv, D]
    kv.write_tokens(torch.tensor([16]), kv.rounded(values))  # block 1, layer 0, keys
    read = kv.read_blocks(torch.tensor([2]), torch.float32)
    assert read[0, :4].tolist() == [0.0, 448.0, -448.0, 1.0]
    assert not read[0, 4:].any()
    kv.clear([1])
    assert not kv.read_blocks(torch.tensor([2]), torch.float32).any()
