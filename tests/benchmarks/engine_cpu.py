"""The torch engine on CPU, in float32 and int8, against `transformers` `generate` and llama.cpp.

    python tests/benchmarks/engine_cpu.py [--engine-dir DIR] [--int8-dir DIR] [--gguf FILE]
                                          [--quick] [--threads N] [--cases b1,b8,512,ttft]

All run in turns (A B A B), in a process each, on the same fresh random prompts and with the same
number of threads; medians are compared. Prefill is the time to one token of every prompt; decode
is the time between two tokens of the whole batch. At batch 8 the prompts have mixed lengths,
which `generate` pads on the left. The rows of llama.cpp need `envs/benchmark-peers.txt`. The rows
of the prefix cache and of the host tier are times to the first token of a prompt of 1024 tokens,
against the same time for a new one. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

# Before torch: spinning threads would steal time from whatever else shares the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from benchmarks.engines.engine_under_test import find_engine, find_gguf  # noqa: E402
from benchmarks.peers.cpu_contenders import BLOCK_SIZE, Contender  # noqa: E402
from serving.config import EngineConfig  # noqa: E402
from serving.engine.torch.engine import TorchEngine  # noqa: E402
from serving.load_report import LoadReport  # noqa: E402
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams  # noqa: E402

PROMPT_LENGTHS = {
    "b1": [256],
    "b8": [512, 384, 320, 256, 192, 128, 96, 64],
    "512": [512],  # for prefill alone
}
MAX_MODEL_LEN = 1024 + 64


def fresh_prompts(case: str, generator: torch.Generator) -> list[list[int]]:
    """Random token ids: no prompt is ever seen twice, so no prefix cache helps."""
    return [
        torch.randint(10, 40_000, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS[case]
    ]


async def measure(
    contenders: dict[str, Contender], case: str, decode_tokens: int, repeats: int
) -> None:
    """Time all of `contenders` in turns and report ours (`fp32`, `int8`) against the others."""
    generator = torch.Generator().manual_seed(len(case))
    prefill_s: dict[str, list[float]] = {who: [] for who in contenders}
    step_s: dict[str, list[float]] = {who: [] for who in contenders}
    lengths = (1,) if case == "512" else (1, 1 + decode_tokens)
    for repeat in range(repeats + 1):  # the first one warms up
        for num_tokens in lengths:
            prompts = fresh_prompts(case, generator)
            for who, contender in contenders.items():
                elapsed, steps = await contender.run(prompts, num_tokens)
                if repeat:
                    step_s[who] += steps
                    prefill_s[who] += [elapsed] if num_tokens == 1 else []
    prompt_tokens, batch = sum(PROMPT_LENGTHS[case]), len(PROMPT_LENGTHS[case])
    median = statistics.median
    rates = {"prefill": {who: prompt_tokens / median(prefill_s[who]) for who in contenders}}
    if case != "512":
        rates["decode"] = {who: batch / median(step_s[who]) for who in contenders}
    for phase, rate in rates.items():
        for ours in ("fp32", "int8"):
            for peer in ("generate", "llama.cpp"):
                if peer in rate:
                    name = f"{phase} {ours} {case} vs {peer}"
                    report(name, rate[ours], rate[peer], contenders[peer].name)


async def measure_prefix_hit(ours: Contender, dtype: str, repeats: int) -> None:
    """Time to first token of a prompt that is new, and of one whose first 90% are cached."""
    length = 1024
    shared = int(0.9 * length) // BLOCK_SIZE * BLOCK_SIZE
    generator = torch.Generator().manual_seed(1024)
    cold_s, hit_s, found = [], [], 0
    for repeat in range(repeats + 1):  # the first one warms up
        prompt, other = torch.randint(10, 40_000, (2, length), generator=generator).tolist()
        seconds = []
        for each in (prompt, prompt[:shared] + other[shared:]):
            seconds.append((await ours.run([each], 1))[0])
        found = ours.cached_tokens
        assert found == shared, f"{found} tokens were found in the cache, not {shared}"
        if repeat:
            cold_s.append(seconds[0])
            hit_s.append(seconds[1])
    report_times(
        f"prefix hit ttft {dtype}", hit_s, cold_s, f"cold prefill of {length}; {found} were cached"
    )


async def measure_host_tier(engine_dir: Path, threads: int, repeats: int) -> None:
    """Time to first token of a prompt: new, and again after another one has evicted it."""
    length = 1024
    engine = TorchEngine(
        engine_dir,
        EngineConfig(
            dtype="float32",
            max_model_len=length + BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            kv_cache_tokens=length + BLOCK_SIZE,  # room for one of them
            max_batch_size=1,
            max_num_batched_tokens=512,
            max_waiting=1,
            host_cache_bytes=512 * 2**20,
            num_threads=threads,
        ),
        "cpu",
        hash_salt="benchmark",
        fingerprint="benchmark",
    )
    first: asyncio.Future[EngineOutput]

    def receive(outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport) -> None:
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
    name = f"cold prefill of the same {length} tokens; {found} of them were found"
    report_times("host tier hit ttft", again_s, new_s, name)


def report(name: str, ours: float, peer: float, peer_name: str) -> None:
    """Rates in tokens/s: higher is better."""
    row = {
        "name": name,
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "peer_name": peer_name,
        "unit": "tokens/s",
        "ratio": round(ours / peer, 3),
    }
    print(json.dumps(row), flush=True)


def report_times(name: str, ours_s: list[float], peer_s: list[float], peer_name: str) -> None:
    """Medians, in ms: lower is better."""
    ours, peer = statistics.median(ours_s), statistics.median(peer_s)
    row = {
        "name": name,
        "ours": round(1e3 * ours, 1),
        "peer": round(1e3 * peer, 1),
        "peer_name": peer_name,
        "unit": "ms",
        "ratio": round(ours / peer, 3),
    }
    print(json.dumps(row), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path, help="float32; default: the newest built")
    parser.add_argument("--int8-dir", type=Path, help="int8; default: the newest built")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp; default: the bundled model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cases", default="b1,b8,512,ttft", help="which of these to measure")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := set(cases) - {*PROMPT_LENGTHS, "ttft"}:
        parser.error(f"no such cases: {', '.join(sorted(unknown))}")
    engine_dir = find_engine(args.engine_dir)
    paths = {
        "fp32": ("ours", engine_dir),
        "int8": ("ours", find_engine(args.int8_dir, "int8")),
        "generate": ("generate", engine_dir),
    }
    if gguf := args.gguf or find_gguf():
        paths["llama.cpp"] = ("llama.cpp", gguf)
    else:
        print("no llama.cpp rows: results/models has no GGUF", file=sys.stderr)
    decode_tokens, repeats = (16, 2) if args.quick else (48, 5)
    with contextlib.ExitStack() as running:
        contenders = {}
        for who, (kind, path) in paths.items():
            contender = running.enter_context(Contender(kind, path, args.threads, MAX_MODEL_LEN))
            try:
                await contender.start()
                contenders[who] = contender
            except ImportError as exc:
                print(f"no {who} rows ({exc}): envs/benchmark-peers.txt", file=sys.stderr)
        for case in PROMPT_LENGTHS:
            if case in cases:
                await measure(contenders, case, decode_tokens, repeats)
        if "ttft" in cases:
            for dtype in ("fp32", "int8"):
                await measure_prefix_hit(contenders[dtype], dtype, repeats)
    if "ttft" in cases:
        torch.set_num_threads(args.threads)
        await measure_host_tier(engine_dir, args.threads, repeats)


if __name__ == "__main__":
    asyncio.run(main())
