"""Decode and prefill tokens/s of the torch engine against `transformers` `generate`, on CPU.

    python tests/benchmarks/engine_cpu.py [--engine-dir DIR] [--quick] [--threads N]

Both run in this process, in turns (A B A B), on the same fresh random prompts and with the same
number of threads; medians are compared. Prefill is the time to one token of every prompt; decode
is the time between two tokens of the whole batch. At batch 8 the prompts have mixed lengths,
which `generate` pads on the left. The host tier's row is the time to the first token of a prompt
whose KV was evicted to host memory, against the same prompt's when it was new. Prints one JSON
object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch: spinning threads would steal time from whatever else shares the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from engine_under_test import find_engine  # noqa: E402
from serving.engine.base import EngineLoad  # noqa: E402
from serving.engine.torch.engine import TorchEngine  # noqa: E402
from serving.protocol import (  # noqa: E402
    EngineOutput,
    EngineRequest,
    KvEvent,
    SamplingParams,
)
from transformers import AutoModelForCausalLM, LogitsProcessorList  # noqa: E402

PROMPT_LENGTHS = {1: [256], 8: [512, 384, 320, 256, 192, 128, 96, 64]}
BLOCK_SIZE = 16


class Ours:
    """The engine, driven through its public interface."""

    def __init__(self, engine_dir: Path, threads: int, max_model_len: int) -> None:
        self._engine = TorchEngine(
            engine_dir,
            max_model_len=max_model_len,
            block_size=BLOCK_SIZE,
            kv_cache_tokens=16 * max_model_len,
            max_batch_size=8,
            max_num_batched_tokens=512,
            max_waiting=64,
            num_threads=threads,
            hash_salt="benchmark",
            fingerprint="benchmark",
        )
        self._finished = asyncio.Event()
        self._pending = 0
        self._count = 0
        self._step_ends: list[tuple[float, int]] = []  # when, and how many got a token

    async def start(self) -> None:
        await self._engine.start(self._receive)

    async def close(self) -> None:
        await self._engine.close()

    async def run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Returns how long each step took in which every prompt got its next token."""
        self._finished.clear()
        self._step_ends.clear()
        self._pending = len(prompts)
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0)
        for prompt in prompts:
            self._count += 1
            request = EngineRequest(str(self._count), prompt, len(prompt), sampling)
            self._engine.submit(request)
        await self._finished.wait()
        ends = [end for end, num_outputs in self._step_ends if num_outputs == len(prompts)]
        return [after - before for before, after in pairwise(ends)]

    def _receive(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: EngineLoad
    ) -> None:
        del events, load
        if outputs:
            self._step_ends.append((time.perf_counter(), len(outputs)))
        for output in outputs:
            assert output.error is None, output.error
            self._pending -= output.finish_reason is not None
        if self._pending == 0:
            self._finished.set()


class Peer:
    """`generate` with its default attention and cache."""

    def __init__(self, engine_dir: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(engine_dir, dtype=torch.float32)
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None  # as many tokens as asked for

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Returns how long each step after the first took."""
        ends: list[float] = []

        def note_time(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends.append(time.perf_counter())
            return scores

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([note_time]),
            )
        assert out.shape[1] == longest + num_tokens
        return [after - before for before, after in pairwise(ends)]


def fresh_prompts(batch: int, generator: torch.Generator) -> list[list[int]]:
    """Random token ids: no prompt is ever seen twice, so no prefix cache helps."""
    return [
        torch.randint(10, 40_000, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS[batch]
    ]


async def measure(ours: Ours, peer: Peer, batch: int, decode_tokens: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    prefill_s: dict[str, list[float]] = {"ours": [], "peer": []}
    step_s: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(repeats + 1):  # the first one warms up
        for num_tokens in (1, 1 + decode_tokens):
            prompts = fresh_prompts(batch, generator)
            for who in ("ours", "peer"):
                started = time.perf_counter()
                if who == "ours":
                    steps = await ours.run(prompts, num_tokens)
                else:
                    steps = peer.run(prompts, num_tokens)
                elapsed = time.perf_counter() - started
                if repeat:
                    step_s[who] += steps
                    prefill_s[who] += [elapsed] if num_tokens == 1 else []
    prompt_tokens = sum(PROMPT_LENGTHS[batch])
    median = statistics.median
    report(
        f"prefill fp32 b{batch} vs generate",
        {who: prompt_tokens / median(times) for who, times in prefill_s.items()},
    )
    report(
        f"decode fp32 b{batch} vs generate",
        {who: batch / median(times) for who, times in step_s.items()},
    )


async def measure_host_tier(engine_dir: Path, threads: int, repeats: int) -> None:
    """Time to first token of a prompt: new, and again after another one has evicted it."""
    length = 1024
    engine = TorchEngine(
        engine_dir,
        max_model_len=length + BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        kv_cache_tokens=length + BLOCK_SIZE,  # room for one of them
        max_batch_size=1,
        max_num_batched_tokens=512,
        max_waiting=1,
        host_cache_bytes=512 * 2**20,
        num_threads=threads,
        hash_salt="benchmark",
        fingerprint="benchmark",
    )
    first: asyncio.Future[EngineOutput]

    def receive(outputs: list[EngineOutput], events: list[KvEvent], load: EngineLoad) -> None:
        del events, load
        for output in outputs:
            first.set_result(output)

    async def first_token_s(request_id: str, prompt: list[int]) -> tuple[float, int]:
        nonlocal first
        first = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        sampling = SamplingParams(max_tokens=1, temperature=0)
        engine.submit(EngineRequest(request_id, prompt, len(prompt), sampling))
        output = await first
        assert output.error is None, output.error
        return time.perf_counter() - started, output.cached_tokens or 0

    generator = torch.Generator().manual_seed(1024)
    new_s, again_s, found = [], [], 0
    await engine.start(receive)
    try:
        for repeat in range(repeats + 1):  # the first one warms up
            prompt, other = torch.randint(10, 40_000, (2, length), generator=generator).tolist()
            cold_s, _ = await first_token_s(f"new-{repeat}", prompt)
            await first_token_s(f"other-{repeat}", other)
            before = engine.load().onloaded_blocks
            hit_s, found = await first_token_s(f"again-{repeat}", prompt)
            assert engine.load().onloaded_blocks - before > 0.9 * found / BLOCK_SIZE
            if repeat:
                new_s.append(cold_s)
                again_s.append(hit_s)
    finally:
        await engine.close()
    ours, peer = statistics.median(again_s), statistics.median(new_s)
    row = {
        "name": "host tier hit ttft",
        "ours": round(1e3 * ours, 1),
        "peer": round(1e3 * peer, 1),
        "peer_name": f"cold prefill of the same {length} tokens; {found} of them were found",
        "unit": "ms",
        "ratio": round(ours / peer, 3),
    }
    print(json.dumps(row), flush=True)


def report(name: str, rates: dict[str, float]) -> None:
    row = {
        "name": name,
        "ours": round(rates["ours"], 1),
        "peer": round(rates["peer"], 1),
        "peer_name": "transformers generate",
        "unit": "tokens/s",
        "ratio": round(rates["ours"] / rates["peer"], 3),
    }
    print(json.dumps(row), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path, default=None, help="default: the newest built")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    args = parser.parse_args()
    engine_dir = find_engine(args.engine_dir)
    torch.set_num_threads(args.threads)
    decode_tokens, repeats = (16, 2) if args.quick else (48, 5)
    peer = Peer(engine_dir)
    ours = Ours(engine_dir, args.threads, max_model_len=1024)
    await ours.start()
    try:
        for batch in PROMPT_LENGTHS:
            await measure(ours, peer, batch, decode_tokens, repeats)
    finally:
        await ours.close()
    await measure_host_tier(engine_dir, args.threads, repeats)


if __name__ == "__main__":
    asyncio.run(main())
