"""The torch engine on one GPU, with the shape of an 8-billion-weight Llama and dummy weights.

    python tests/benchmarks/engine_cuda.py [--rows decode,prefill,throughput,overhead,prefix]

One JSON object a line, as soon as it is known; progress goes to stderr. Every figure is held
against a limit or a peer that was measured in the same run, on the same device:

- `decode step b1|b16|b64 ctx2048`: time between two tokens of the whole batch, over the time a copy
  of as many bytes takes (weights read in a step, and the KV of the batch).
- `prefill 2k|8k`: FLOP/s up to the first token of a fresh prompt, over those of a square matmul.
- `throughput 64 streams 1k/256`: output tokens/s, over `transformers` continuous batching of the
  same weights, the best of its configurations; the engine is closed before.
- `scheduler share b16`: share of a decode step in which the GPU has nothing to do.
- `prefix hit 90% of 8k`: TTFT with nine tenths of the prompt cached, over TTFT without.

Rows run in a process of their own, which is started anew for the remaining rows after one failed:
a row that failed says why, and takes no other with it. `--tiny --device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be fetched

BEGIN, END = "begin row ", "end row "
ROWS = ("decode", "prefill", "overhead", "prefix", "throughput")
"""In the order they run; the last one closes the engine."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the load, in tokens; all but `batches` and `streams`."""

    batches: tuple[int, ...]
    context: int
    steps: int
    prompts: tuple[int, ...]
    streams: int
    stream_prompt: int
    stream_output: int
    cached_prompt: int
    copy_bytes: int
    matmul: int


FEWEST_STEPS = 50
REAL = Sizes((1, 16, 64), 2048, 96, (2048, 8192), 64, 1024, 256, 8192, 4 << 30, 8192)
TINY = Sizes((1, 4), 128, 60, (128, 256), 4, 64, 16, 512, 64 << 20, 512)


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def report(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def short(num_tokens: int) -> str:
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else str(num_tokens)


# --- the process that measures --------------------------------------------------------------------


class Bench:
    """The engine under test, the limits of its device, and a method per row."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.engines.driven_engine import DrivenEngine
        from benchmarks.engines.model_costs import ModelCosts

        self.sizes = TINY if options.tiny else REAL
        self.device, self.dtype = options.device, options.dtype
        self.engine_dir = engine_dir = options.engine_dir
        self.costs = ModelCosts(engine_dir, self.dtype)
        longest = max(self.sizes.cached_prompt, *self.sizes.prompts)
        room = max(self.sizes.batches) * (self.sizes.context + self.sizes.steps)
        self.engine = DrivenEngine(
            engine_dir,
            device=self.device,
            dtype=self.dtype,
            max_model_len=longest + 256,
            max_batch_size=max(self.sizes.streams, *self.sizes.batches),
            max_num_batched_tokens=options.max_num_batched_tokens or longest,
            kv_cache_tokens=max(room, 4 * longest) * 5 // 4,
        )

    @property
    def on_gpu(self) -> bool:
        return str(self.device) == "cuda"

    async def decode(self) -> None:
        """Steady decode of each batch size, in the middle of which the context is `context`."""
        from benchmarks.engines.device_limits import copy_bandwidth

        bandwidth = copy_bandwidth(self.device, self.sizes.copy_bytes)
        note(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
        for batch in self.sizes.batches:
            steps = self.sizes.steps
            prompt = self.sizes.context - steps // 2
            step_s = (await self.engine.run([prompt] * batch, steps)).steady_steps()
            if len(step_s) < FEWEST_STEPS:
                raise RuntimeError(f"b{batch}: only {len(step_s)} of {steps} steps were steady")
            weights, kv = self.costs.read_bytes(batch, self.sizes.context)
            floor_s = (weights + kv) / bandwidth
            median_s = statistics.median(step_s)
            report(
                {
                    "name": f"decode step b{batch} ctx{self.sizes.context}",
                    "ours": round(1e3 * median_s, 3),
                    "limit": round(1e3 * floor_s, 3),
                    "limit_name": f"copy of {(weights + kv) / 1e9:.2f} GB at "
                    f"{bandwidth / 1e9:.0f} GB/s, measured",
                    "unit": "ms",
                    "ratio": round(median_s / floor_s, 3),
                    "goal": 1.25,
                    "mean": round(1e3 * statistics.fmean(step_s), 3),
                    "p99": round(1e3 * statistics.quantiles(step_s, n=100)[98], 3),
                    "num_steps": len(step_s),
                }
            )

    async def prefill(self) -> None:
        import torch
        from benchmarks.engines.device_limits import matmul_rate

        size = self.sizes.matmul
        limit = matmul_rate(self.device, size, getattr(torch, self.dtype))
        note(f"matmul {limit / 1e12:.1f} TFLOP/s")
        for length in self.sizes.prompts:
            times = [(await self.engine.run([length], 1)).ttft_s for _ in range(7)][2:]
            rate = self.costs.prefill_flops(length) / statistics.median(times)
            report(
                {
                    "name": f"prefill {short(length)}",
                    "ours": round(rate / 1e12, 3),
                    "limit": round(limit / 1e12, 3),
                    "limit_name": f"{size}^3 {self.dtype} matmul, measured",
                    "unit": "TFLOP/s",
                    "ratio": round(rate / limit, 3),
                    "goal": 0.7,
                    "ttft_ms": round(1e3 * statistics.median(times), 2),
                    "tokens_per_s": round(length / statistics.median(times)),
                }
            )

    async def overhead(self) -> None:
        """Steps without a profiler give the time, steps with one the work that was done in it."""
        from benchmarks.engines.device_limits import recorded

        if not self.on_gpu:
            raise RuntimeError("needs a GPU: on a CPU nothing is left to overlap")
        batch, steps = min(16, max(self.sizes.batches)), self.sizes.steps
        prompt = self.sizes.context - steps
        plain_s = statistics.median((await self.engine.run([prompt] * batch, steps)).steady_steps())
        with recorded() as _:  # the first one loads the tracing library
            await self.engine.run([prompt], 2)
        async with self.engine.running([prompt] * batch, 4 * steps) as run:
            await run.steady(steps // 2)
            with recorded() as idle:
                before = len(run.steady_steps())
                await run.steady(steps // 2)
                traced_s = statistics.fmean(run.steady_steps()[before:])
        share = max(0.0, 1 - (1 - idle.share) * traced_s / plain_s)
        report(
            {
                "name": f"scheduler share b{batch}",
                "ours": round(1e3 * share * plain_s, 3),
                "limit": round(1e3 * plain_s, 3),
                "limit_name": "whole decode step",
                "unit": "ms",
                "ratio": round(share, 4),
                "goal": 0.05,
                "idle_while_traced": round(idle.share, 4),
                "of_it_in_gaps_over_20us": round(idle.share_in_long_gaps, 4),
                "traced_step_ms": round(1e3 * traced_s, 3),
            }
        )

    async def prefix(self) -> None:
        length = self.sizes.cached_prompt
        cold, warm = [], []
        for _ in range(7):
            prompt = self.engine.fresh_prompt(length)
            cold.append((await self.engine.run([prompt], 1)).ttft_s)
            shared = prompt[: length * 9 // 10]
            rest = self.engine.fresh_prompt(length - len(shared))
            warm.append((await self.engine.run([shared + rest], 1)).ttft_s)
        cold_s, warm_s = statistics.median(cold[2:]), statistics.median(warm[2:])
        report(
            {
                "name": f"prefix hit 90% of {short(length)} on {self.device}",
                "ours": round(1e3 * warm_s, 3),
                "peer": round(1e3 * cold_s, 3),
                "peer_name": "TTFT of the same length, nothing cached",
                "unit": "ms",
                "ratio": round(warm_s / cold_s, 4),
                "goal": 0.2,
            }
        )

    async def throughput(self) -> None:
        from benchmarks.peers.transformers_batching import best_rate

        sizes = self.sizes
        lengths = [sizes.stream_prompt] * sizes.streams
        await self.engine.run(lengths, 8)
        prompts = [self.engine.fresh_prompt(length) for length in lengths]
        run = await self.engine.run(prompts, sizes.stream_output)
        ours = sizes.streams * sizes.stream_output / run.wall_s
        note(f"engine: {ours:.0f} output tokens/s; now the peer")
        await self.engine.close()
        peer, peer_name, tried = best_rate(
            self.engine_dir, self.device, self.dtype, prompts, sizes.stream_output, note
        )
        report(
            {
                "name": f"throughput {sizes.streams} streams "
                f"{short(sizes.stream_prompt)}/{sizes.stream_output}",
                "ours": round(ours, 1),
                "peer": round(peer, 1),
                "peer_name": peer_name,
                "unit": "output tokens/s",
                "ratio": round(ours / peer, 3),
                "goal": 2.0,
                "peer_configurations": tried,
            }
        )

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        name = torch.cuda.get_device_name() if self.on_gpu else "CPU"
        return {
            "name": "machine",
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "dtype": self.dtype,
            "num_weights": self.costs.num_weights,
        }


async def measure(options: argparse.Namespace) -> None:
    """The rows in turn; ends at the first failure, since a GPU may not be usable after it."""
    started = time.monotonic()
    bench = Bench(options)
    if options.describe:
        report(bench.describe())
    await bench.engine.start()
    note(f"engine ready after {time.monotonic() - started:.1f} s")
    try:
        for row in options.rows:
            print(f"{BEGIN}{row}", flush=True)
            started = time.monotonic()
            await getattr(bench, row)()
            print(f"{END}{row}", flush=True)
            note(f"{row} took {time.monotonic() - started:.1f} s")
    finally:
        await bench.engine.close()


# --- the process that sees to it ------------------------------------------------------------------


def supervise(options: argparse.Namespace) -> bool:
    """Measure in processes of their own until every row succeeded or failed; False if one did."""
    rows, failed, describe = [row for row in ROWS if row in options.rows], [], True
    while rows:
        command = [sys.executable, __file__, "--measure", f"--rows={','.join(rows)}"]
        command += [f"--device={options.device}", f"--dtype={options.dtype}"]
        command += [f"--engine-dir={options.engine_dir}"]
        command += [f"--max-num-batched-tokens={options.max_num_batched_tokens}"]
        command += ["--tiny"] * options.tiny + ["--describe"] * describe
        done, reason = watch(command, options.row_s)
        describe = False
        rows = [row for row in rows if row not in done]
        if rows:
            # The first of the remaining ones is to blame, even if its process did not come to it.
            failed.append(rows.pop(0))
            report({"name": failed[-1], "error": reason or "the process ended without a word"})
    return not failed


def watch(command: list[str], row_s: float) -> tuple[set[str], str | None]:
    """Run it and pass its rows on; returns the finished rows and the last lines of a failure."""
    done: set[str] = set()
    words: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        listener = threading.Thread(target=relay, args=(process.stderr, words), daemon=True)
        listener.start()
        timers = [threading.Timer(row_s, process.kill)]
        timers[-1].start()
        for line in process.stdout:
            if line.startswith((BEGIN, END)):
                timers[-1].cancel()
                timers.append(threading.Timer(row_s, process.kill))
                timers[-1].start()
                done |= {line.removeprefix(END).strip()} if line.startswith(END) else set()
            elif line.startswith("{"):
                print(line, end="", flush=True)
            else:  # what libraries print
                note(line.rstrip())
        process.wait()
        timers[-1].cancel()
        listener.join(5)
    if process.returncode == 0:
        return done, None
    killed = f"killed by signal {-process.returncode} (a row may take {row_s:g} s)"
    return done, killed if process.returncode < 0 else (words or ["no message"])[-1]


def relay(stream: Any, words: list[str]) -> None:
    """Pass stderr on, and keep its last line that is not empty."""
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip():
            words[:] = [line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--engine-dir", type=Path, help="default: made for this run")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=0, help="default: the longest prompt"
    )
    parser.add_argument("--row-s", type=float, default=240.0, help="limit for one row")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows.split(",")
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.measure:
        import uvloop

        uvloop.run(measure(options))
        return
    with tempfile.TemporaryDirectory(prefix="dummy-engine-") as folder:
        if options.engine_dir is None:
            from benchmarks.engines.dummy_engine import make_engine

            make_engine(
                Path(folder, "made"),
                device=options.device,
                dtype=options.dtype,
                tiny=options.tiny,
            )
            options.engine_dir = Path(folder, "made", "engine")
        if not supervise(options):
            sys.exit(1)


if __name__ == "__main__":
    main()
