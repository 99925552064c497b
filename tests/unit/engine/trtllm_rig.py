"""The adapter over the stand-in library, with a tiny model and an engine folder for each role."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from serving.config import EngineConfig
from serving.engine.manifest import ENGINE_FORMAT, BuildCheck, EngineManifest
from serving.engine.trtllm.engine import DEFAULT_TIMEOUTS, TensorRtLlmEngine, Timeouts
from serving.protocol import BlocksRemoved, EngineOutput, EngineRequest, Role
from unit.engine.torch_rig import DEADLINE_S, VOCAB, Sink, greedy, request, save_model

STANDIN = Path(__file__).parents[2] / "standin"
NEWEST = "1.3.0rc27"
VERSIONS = ("1.0.0", "1.1.0", "1.2.1", NEWEST)
EOS = (2, 3)
BLOCK_SIZE = 16
LIMITS: dict[str, Any] = {
    "backend": "tensorrt_llm",
    "max_model_len": 256,
    "block_size": BLOCK_SIZE,
    "kv_cache_tokens": 4096,
    "max_batch_size": 8,
    "max_num_batched_tokens": 256,
    "max_waiting": 32,
}


@contextmanager
def standin(monkeypatch: pytest.MonkeyPatch, version: str = NEWEST) -> Iterator[None]:
    """`import tensorrt_llm` finds the stand-in, as that version, and nothing of it stays."""
    monkeypatch.setenv("STANDIN_TRTLLM_VERSION", version)
    monkeypatch.syspath_prepend(str(STANDIN))
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def block_size(version: str) -> int:
    """1.0 has blocks of 32 tokens and no argument to change that."""
    return 32 if version.startswith("1.0") else BLOCK_SIZE


def make_engine_dir(
    folder: Path,
    version: str = NEWEST,
    changes: dict[str, Any] | None = None,
    transfer_timeout_s: int = 2,
) -> Path:
    """A tiny random model, and the arguments of its `LLM` for each role.

    `changes` are more arguments, which count as a person's.
    """
    save_model(folder)
    line = tuple(int(part) for part in version.split(".")[:2])
    for role in ("agg", "prefill", "decode"):
        values: dict[str, Any] = {
            "model": ".",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_seq_len": LIMITS["max_model_len"],
            "max_batch_size": LIMITS["max_batch_size"],
            "max_num_tokens": LIMITS["max_num_batched_tokens"],
            "enable_chunked_prefill": True,
            "enable_iter_perf_stats": True,
            "disable_overlap_scheduler": role == "prefill",
            "cuda_graph_config": None,
            "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
            "kv_cache_config": {
                "enable_block_reuse": True,
                "event_buffer_max_size": 4096,
                "max_tokens": LIMITS["kv_cache_tokens"],
                "tokens_per_block": block_size(version),
            },
            "_required": list(changes or {}),
        }
        if role != "agg":
            values["cache_transceiver_config"] = {
                "backend": "nixl" if line == (1, 0) else "NIXL",
                "transceiver_runtime": "CPP",
                "max_tokens_in_buffer": LIMITS["max_model_len"],
                "kv_transfer_timeout_ms": 1000 * transfer_timeout_s,
            }
        values |= changes or {}
        (folder / f"llm_args-{role}.yaml").write_text(yaml.safe_dump(values))
    return folder


def make_manifest(**changes: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "format": ENGINE_FORMAT,
        "fingerprint": "tiny",
        "backend": "tensorrt_llm",
        "device": "cpu",
        "model_id": "tiny",
        "commit": None,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "kv_layout": None,
        "model_max_len": 512,
        "vocab_size": VOCAB,
        "eos_token_ids": list(EOS),
        "bos_token_id": 1,
        "pad_token_id": 0,
        "hash_salt": "tiny",
        "weights": {},
        "versions": {},
        "check": BuildCheck(
            kind="same_files",
            num_positions=1,
            max_abs_diff=0.0,
            argmax_agreement=1.0,
            tolerance=0.0,
        ),
        "created": 0,
        "flow": "pytorch",
    }
    return EngineManifest(**values | changes)


def make_engine(
    engine_dir: Path,
    role: Role = "agg",
    manifest: EngineManifest | None = None,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    **limits: Any,
) -> TensorRtLlmEngine:
    return TensorRtLlmEngine(
        engine_dir,
        manifest or make_manifest(),
        role=role,
        instance_id=f"{role}-0",
        engine=EngineConfig(**LIMITS | limits),
        timeouts=timeouts,
    )


def decode_request(prefill: EngineRequest, last: EngineOutput, **more: Any) -> EngineRequest:
    """As a frontend makes it, over the wire."""
    made = msgspec.structs.replace(
        prefill,
        token_ids=prefill.token_ids + last.token_ids,
        phase="decode",
        kv_transfer_params=last.kv_transfer_params,
        **more,
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=EngineRequest)


def num_removed(sink: Sink) -> int:
    return sum(len(e.block_hashes) for e in sink.events if isinstance(e, BlocksRemoved))


async def prefilled(
    engine: TensorRtLlmEngine, sink: Sink, name: str, prompt: list[int], max_tokens: int = 12
) -> tuple[EngineRequest, EngineOutput]:
    asked = request(name, prompt, greedy(max_tokens), phase="prefill")
    engine.submit(asked)
    await sink.finished(name)
    return asked, sink.last[name]


@asynccontextmanager
async def running(
    engine_dir: Path, role: Role = "agg", manifest: EngineManifest | None = None, **options: Any
) -> AsyncIterator[tuple[TensorRtLlmEngine, Sink]]:
    """An engine whose library holds no block, and agrees with its events, when the test is over."""
    engine, sink = make_engine(engine_dir, role, manifest, **options), Sink()
    await engine.start(sink)
    try:
        yield engine, sink
        await settled(engine)
        library(engine).check_integrity()
        assert set(engine.snapshot()) == sink.stored
    finally:
        await engine.close()


def library(engine: TensorRtLlmEngine) -> Any:
    """The stand-in's own books: `check_integrity()` and `load()`."""
    return engine._llm._executor


async def settled(*engines: TensorRtLlmEngine, within_s: float = DEADLINE_S) -> None:
    """Wait until nothing runs, in the adapter and in the library, and no block is in use."""
    for engine in engines:
        await until(
            lambda engine=engine: (
                not (  # type: ignore[misc]
                    len(engine._requests) or library(engine).load().active_blocks
                )
            ),
            within_s,
        )


async def until(condition: Callable[[], object], within_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s")
        await asyncio.sleep(0.002)
