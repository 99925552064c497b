"""The adapter over the stand-in library, for every supported version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from serving.config import parse
from serving.engine.trtllm.build.llm_args import render
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.versions import parse_version
from serving.protocol import EngineTransferParams, Role
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import generate, greedy, random_prompts, request
from unit.engine.trtllm_rig import (
    VERSIONS,
    decode_request,
    prefilled,
    running,
)


@pytest.mark.parametrize("version", VERSIONS)
async def test_greedy_output_is_the_models_in_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        prompts = random_prompts([5, 40, 70])
        async with running(engine_dir, block_size=size) as (engine, sink):
            assert engine.spec.num_blocks == rig.LIMITS["kv_cache_tokens"] // size
            assert engine.spec.kv_layout is None
            for n, prompt in enumerate(prompts):
                engine.submit(request(f"r{n}", prompt, greedy(12)))
            await sink.finished("r0", "r1", "r2")
            for n, prompt in enumerate(prompts):
                assert sink.tokens[f"r{n}"] == generate(engine_dir, prompt, 12)
                assert sink.last[f"r{n}"].finish_reason == "length"


@pytest.mark.parametrize("version", VERSIONS)
async def test_prefill_and_decode_give_the_same_output_in_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        prompt = random_prompts([70])[0]
        async with (
            running(engine_dir, "prefill", block_size=size) as (source, prefill_sink),
            running(engine_dir, "decode", block_size=size) as (target, decode_sink),
        ):
            asked, last = await prefilled(source, prefill_sink, "r", prompt)
            assert last.finish_reason == "length"
            assert isinstance(last.kv_transfer_params, EngineTransferParams)
            assert last.kv_transfer_params.source_instance == "prefill-0"
            target.submit(decode_request(asked, last))
            await decode_sink.finished("r")
            assert last.token_ids + decode_sink.tokens["r"] == generate(engine_dir, prompt, 12)
            assert decode_sink.cached["r"] == len(prompt)
            assert source.transfers.kv_transport == target.transfers.kv_transport == "nixl"
            stats = target.transfers
            assert (
                stats.kv_transfers,
                stats.kv_transfer_failures,
                stats.local_prefill_fallbacks,
            ) == (1, 0, 0)
            assert stats.kv_bytes_received > 0
            assert stats.kv_transfer_seconds > 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_arguments_that_build_engine_writes_are_taken_by_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    config = parse(
        {
            "engine": rig.LIMITS | {"block_size": size},
            "tensorrt_llm": {"guided_decoding": "none"},
            "kv_transfer": {"transport": "nixl"},
        }
    )
    roles: tuple[Role, ...] = ("agg", "prefill", "decode")
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        for role in roles:
            text = render(
                config,
                role,
                version=parse_version(version),
                flow="pytorch",
                spread=Parallelism(),
                dtype="float32",
            )
            (engine_dir / f"llm_args-{role}.yaml").write_text(text)
            async with running(engine_dir, role, block_size=size) as (engine, sink):
                engine.submit(request("r", [5, 6, 7], greedy(3)))
                await sink.finished("r")
                assert sink.tokens["r"] == generate(engine_dir, [5, 6, 7], 3)
                assert engine.transfers.kv_transport == ("" if role == "agg" else "nixl")


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1"])
async def test_built_engine_serves_where_its_backend_exists(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `trtllm-build` leaves it, as far as the stand-in looks."""
    config = parse(
        {
            "engine": rig.LIMITS | {"flow": "trtllm-build", "dtype": "float32"},
            "tensorrt_llm": {"guided_decoding": "none"},
        }
    )
    rig.make_engine_dir(tmp_path, version)
    built = tmp_path / "trtllm-tp1-pp1"
    shutil.copytree(tmp_path, built / "standin-model")
    (built / "rank0.engine").touch()
    limits = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 256}
    plugins = {"tokens_per_block": rig.BLOCK_SIZE, "use_paged_context_fmha": "enable"}
    content = {
        "version": version,
        "pretrained_config": {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}},
        "build_config": limits | {"plugin_config": plugins},
    }
    (built / "config.json").write_text(json.dumps(content))
    text = render(
        config,
        "agg",
        version=parse_version(version),
        flow="trtllm-build",
        spread=Parallelism(),
        dtype="float32",
        model=built.name,
    )
    (tmp_path / "llm_args-agg.yaml").write_text(text)
    manifest = rig.make_manifest(flow="trtllm-build")
    with rig.standin(monkeypatch, version):
        async with running(tmp_path, manifest=manifest) as (engine, sink):
            engine.submit(request("r", [5, 6, 7], greedy(3, logprobs=2)))
            await sink.finished("r")
            assert sink.tokens["r"] == generate(tmp_path, [5, 6, 7], 3)
            assert [row.token_id for row in sink.logprobs["r"]] == sink.tokens["r"]
