"""The stand-in as one version of TensorRT-LLM, imported for one test and forgotten after it."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.load_report import LoadReport
from standin.install import install

DEADLINE_S = 30.0
NEWEST = "1.3.0rc27"
PROMPT = [5 + i % 300 for i in range(37)]
VERSIONS = ["1.0.0", "1.1.0", "1.2.1", NEWEST]
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_seq_len": 256,
    "max_num_tokens": 256,
    "max_batch_size": 8,
    "skip_tokenizer_init": True,
}
KV: dict[str, Any] = {"max_tokens": 2048, "tokens_per_block": 8}


@contextmanager
def installed(folder: Path, version: str) -> Iterator[Path]:
    """Importable as `tensorrt_llm` inside; its folder."""
    root = install(folder / f"standin-{version}", version)
    _forget()
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield root
    finally:
        sys.path.remove(str(root))
        _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


class Library:
    """What a test needs of the package, and the LLMs it made."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.top: Any = importlib.import_module("tensorrt_llm")
        self.api: Any = importlib.import_module("tensorrt_llm.llmapi")
        self.errors: Any = importlib.import_module("tensorrt_llm.executor.utils")
        self._made: list[Any] = []

    def llm(self, *, kv: dict[str, Any] | None = None, **more: Any) -> Any:
        cache = KV | (kv or {})
        known = self.api.KvCacheConfig.model_fields
        cache = {key: value for key, value in cache.items() if key in known}
        made = self.top.LLM(
            model=str(self.model),
            kv_cache_config=self.api.KvCacheConfig(**cache),
            **{**SIZES, **more},
        )
        self._made.append(made)
        return made

    def pair(self, timeout_ms: int = 60_000, **more: Any) -> tuple[Any, Any]:
        """Two LLMs that can hand KV over, in this process."""
        transceiver = self.api.CacheTransceiverConfig(
            backend="NIXL", kv_transfer_timeout_ms=timeout_ms
        )
        return tuple(self.llm(cache_transceiver_config=transceiver, **more) for _ in range(2))  # type: ignore[return-value]

    def sampling(self, max_tokens: int = 8, **more: Any) -> Any:
        return self.top.SamplingParams(**({"end_id": -1, "max_tokens": max_tokens} | more))

    def context(self) -> Any:
        return self.api.DisaggregatedParams(request_type="context_only")

    def shut_down(self) -> None:
        for llm in self._made:
            if llm._executor is not None:
                executor = llm._executor
                llm.shutdown()
                executor.check_integrity()


async def idle(llm: Any, active_blocks: int = 0) -> None:
    """Wait until nothing runs and so many blocks are held."""
    for _ in range(int(DEADLINE_S / 0.005)):
        if _is_idle(llm._executor.load(), active_blocks):
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(f"still busy: {llm._executor.load()}")


def _is_idle(load: LoadReport, active_blocks: int) -> bool:
    return not load.num_running and not load.num_waiting and load.active_blocks == active_blocks


def environment(root: Path, **more: str) -> dict[str, str]:
    """For a process of its own that finds the stand-in and this project."""
    scripts = Path(__file__).parents[5] / "scripts"
    return os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{scripts}",
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


async def steps(result: Any) -> list[tuple[list[int], list[int], str | None]]:
    """(cumulative ids, their difference, finish_reason) of each response."""
    seen = []
    async with asyncio.timeout(DEADLINE_S):
        async for step in result:
            assert step is result
            output = step.outputs[0]
            seen.append((list(output.token_ids), output.token_ids_diff, output.finish_reason))
    return seen
