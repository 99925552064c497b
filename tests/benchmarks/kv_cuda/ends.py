"""One end of a transfer from GPU to GPU: a KV pool with known contents, and how it copies blocks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kv_ends import Held, host_view, transfer
from serving.engine.torch.kv.pool import KvPool
from serving.kv_layout import BlocksInPlace, KvLayout
from serving.kv_transfer import staging
from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.transports.nixl import nixl_module

LAYOUT = KvLayout.uniform(
    num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
)
PROMPTS = {"1k": 1024, "8k": 8192, "32k": 32768}


def write_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class End:
    """A pool whose blocks `order` hold prompt 0, 1, 2, ... in this order."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.dry: bool = options.dry
        self.device = "cpu" if self.dry else "cuda"
        self.num_blocks = LAYOUT.num_blocks(max(PROMPTS.values())) // (64 if self.dry else 1)
        self.pool = KvPool(LAYOUT, self.num_blocks, self.device)
        shuffled = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
        self.order = (shuffled + 1).tolist()
        self.spans: list[tuple[str, float, float]] = []

    def transfer(self, name: str, *, in_place: bool = False) -> Any:
        kind = "ucx-gpu" if self.dry and name == "ucx" else name
        options = {"chunk_bytes": None, "transfer_s": 30.0, "in_place": in_place}
        return transfer(kind, LAYOUT, device=self.device, **options)

    def blocks_of(self, tokens: int) -> int:
        return LAYOUT.num_blocks(tokens) // (64 if self.dry else 1) or 1

    def copy(self, kind: str, first: int, data: Any) -> None:
        """Between the pool and a staging buffer; remembers when."""
        started = time.monotonic()
        blocks = self.order[first : first + data.nbytes // LAYOUT.block_bytes]
        on_gpu = isinstance(data, GpuBuffer | BlocksInPlace)
        buffer = host_view(data) if self.dry and on_gpu else data
        (self.pool.gather if kind == "gather" else self.pool.scatter)(blocks, buffer)
        self.spans.append((kind, started, time.monotonic()))

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Words that block `first + i` of the prompt must hold: `[count, words]`."""
        words = torch.arange(LAYOUT.block_bytes // 4, device=self.device, dtype=torch.int64)
        block = torch.arange(first, first + count, device=self.device, dtype=torch.int64)
        return ((block[:, None] * 2654435761 + words * 40503) % 2147483647).to(torch.int32)

    def fill(self) -> None:
        for first in range(0, self.num_blocks, 64):
            data = self.rows(first, min(64, self.num_blocks - first))
            for row, block in zip(data, self.order[first : first + len(data)], strict=True):
                self.pool.tensor[block].view(-1).view(torch.int32).copy_(row)
        self.wait()

    def wrong_blocks(self, num_blocks: int) -> int:
        wrong = 0
        for first in range(0, num_blocks, 64):
            data = self.rows(first, min(64, num_blocks - first))
            for row, block in zip(data, self.order[first : first + len(data)], strict=True):
                wrong += not torch.equal(self.pool.tensor[block].view(-1).view(torch.int32), row)
        return wrong

    def clear(self) -> None:
        self.pool.tensor.zero_()
        self.wait()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def flat(self) -> torch.Tensor:
        return self.pool.tensor.view(-1).view(torch.uint8)


class Source(Held):
    def __init__(self, end: End) -> None:
        super().__init__()
        self._end = end
        self.memory = end.pool.memory

    def open(self, request_id: str, nonce: str) -> int:
        return self._end.num_blocks

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._end.copy("gather", first, out)

    @contextmanager
    def lend(self, request_id: str, first: int, count: int) -> Iterator[list[int]]:
        yield self._end.order[first : first + count]


def set_plan(chunk_mib: int, depth: int) -> None:
    size = chunk_mib << 20
    staging.GPU_SIZES = dataclasses.replace(
        staging.GPU_SIZES,
        chunk_bytes=size,
        least_bytes=min(size, 32 << 20),
        depth=depth,
        num_buffers=2 * depth,
    )


def nixl_agent(name: str) -> Any:
    """An agent with the library's defaults, including its progress thread."""
    import importlib

    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    return importlib.import_module(f"{nixl_module()}._api").nixl_agent(name)


def region(data: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    kind = "VRAM" if data.is_cuda else "DRAM"
    return kind, (data.data_ptr(), data.nbytes, max(0, data.get_device()))
