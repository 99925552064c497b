"""One prefill and one decode worker against two aggregated ones, under long prompts and steady decode.

    python tests/benchmarks/disagg.py [--setups disagg,agg-default,...] [--rates 1,2] [--out FILE]
    python tests/benchmarks/disagg.py --verdict [--plot FILE.png] --out FILE

Everything is real: frontend, etcd, NATS, UCX, and on two GPUs a worker on each, with the shape of an
8-billion-weight Llama and dummy weights. The load is `mixed_load`: steady decode streams, among
which long prompts arrive. Set-ups differ in nothing but topology and `max_num_batched_tokens`:
`disagg`, `agg-default` (what the configuration says by itself) and `agg-N`; the router is `kv`.

Every measurement is one JSON line, and is appended to `--out`, so a sweep may be made in parts:
a set-up is not begun, nor a rate, that would not end within `--budget-s`. Then come the verdicts, for
each rate that both kinds were measured at:

- `itl p99 vs default`: disaggregated, over `agg-default`.
- `itl p99 vs best aggregated at equal ttft p90`: over the aggregated set-up with the lowest ITL p99
  among those whose TTFT p90 is at most 1.05 times the disaggregated one. When there is none, the
  one with the nearest TTFT p90 is taken, and the row says so.

`--tiny` tries the script on a CPU, where its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import msgspec  # noqa: E402
import uvloop  # noqa: E402
from benchmarks.load.mixed_load import SETTLE_S, Load, run  # noqa: E402
from benchmarks.load.streaming_client import Client  # noqa: E402
from msgspec import Struct  # noqa: E402
from serving.engine.manifest import load_manifest  # noqa: E402

MODEL = "benchmark"
SETUPS = ("disagg", "agg-default", "agg-256", "agg-512", "agg-1024", "agg-2048", "agg-8192")
EQUAL_TTFT = 1.05
IDLE_S = 20.0
START_GUESS_S = 60.0


class Measurement(Struct, frozen=True):
    """One line of the results. `measured` has the fields of `mixed_load.Measured`."""

    setup: str
    machine: str
    load: Load
    measured: dict[str, Any]
    service: dict[str, Any]
    when: int

    @property
    def conditions(self) -> Load:
        """Two measurements are comparable only if this is equal."""
        return self.load

    def row(self) -> dict[str, Any]:
        name = f"{self.setup}, {self.load.rate:g} prompts/s"
        return {"name": name, "unit": "ms", **self.measured, **self.service}


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def report(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


# --- set-ups --------------------------------------------------------------------------------------


def sections(setup: str, options: argparse.Namespace) -> dict[str, Any]:
    """The sections of `config.yaml` for this set-up."""
    longest = options.prompt_tokens + options.output_tokens
    engine: dict[str, Any] = {
        "weights": "dummy",
        "max_model_len": max(longest, options.stream_prompt + options.stream_output) + 16,
        "max_batch_size": options.max_batch_size,
    }
    if options.tiny:
        engine |= {"num_threads": 1, "kv_cache_tokens": 16384}
    if setup == "disagg":
        engine["max_num_batched_tokens"] = options.prefill_chunk
    elif setup != "agg-default":
        engine["max_num_batched_tokens"] = int(setup.removeprefix("agg-"))
    return {
        "model": {"id": options.model_id, "name": MODEL},
        "engine": engine,
        "workers": {"agg": 2, "prefill": 1, "decode": 1},
        "kv_transfer": {"transport": options.transport},
    }


def measure_setup(
    setup: str, options: argparse.Namespace, ends: float
) -> Iterator[tuple[float, Measurement]]:
    """Start the set-up, and measure at each rate that fits into the budget."""
    from benchmarks.load.running_service import RunningService

    topology: Any = "disagg_router" if setup == "disagg" else "agg_router"
    vocab_size = load_manifest(options.engine_dir).vocab_size
    with (
        tempfile.TemporaryDirectory(prefix="disagg-", ignore_cleanup_errors=True) as folder,
        RunningService(
            Path(folder),
            options.engine_dir,
            topology,
            sections(setup, options),
            device=options.device,
            dtype=options.dtype,
            gpus=options.gpus,
        ) as service,
    ):
        note(f"{setup}: ready after {service.start_s:.1f} s")
        before = service.ready()
        for rate in options.rates:
            load = Load(
                streams=options.streams,
                stream_prompt=options.stream_prompt,
                stream_output=options.stream_output,
                prompt=options.prompt_tokens,
                output=options.output_tokens,
                rate=rate,
                vocab_size=vocab_size,
                warm_up_s=options.warm_up_s,
                measure_s=options.measure_s,
                seed=options.seed,
                temperature=options.temperature,
            )
            if time.monotonic() + load.warm_up_s + load.measure_s + SETTLE_S > ends:
                note(f"{setup}: no time left for {rate:g} prompts/s")
                return
            measured = uvloop.run(run(Client(service.port, MODEL), load))
            service.check_alive()
            if not measured.num_gaps:
                raise RuntimeError(f"no stream had tokens: {measured.first_failure}")
            after = wait_idle(service)
            facts = {"start_s": round(service.start_s, 1), **counters(before, after)}
            before = after
            plain = msgspec.to_builtins(measured)
            yield rate, Measurement(setup, options.machine, load, plain, facts, int(time.time()))


def wait_idle(service: Any) -> dict[str, Any]:
    """`/ready` once no request runs any more, or its state at the deadline."""
    deadline = time.monotonic() + IDLE_S
    while True:
        state: dict[str, Any] = service.ready()
        busy = sum(row["num_running"] + row["num_waiting"] for row in state["instances"])
        if not busy or time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def counters(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Counters of the workers meanwhile: how much KV travelled, and how many transfers failed."""
    names = ("kv_transfers", "kv_transfer_failures", "local_prefill_fallbacks", "preemptions")
    return {
        name: sum(row[name] for row in after["instances"])
        - sum(row[name] for row in before["instances"])
        for name in names
    }


# --- verdicts -------------------------------------------------------------------------------------


def latest(measurements: list[Measurement]) -> dict[tuple[Load, str], Measurement]:
    """The newest of each set-up under each load."""
    ordered = sorted(measurements, key=lambda m: m.when)
    return {(m.conditions, m.setup): m for m in ordered}


def verdicts(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """The rows of the docstring, for every load that `disagg` and others were measured under."""
    newest = latest(measurements)
    rows = []
    for (load, setup), ours in newest.items():
        if setup != "disagg":
            continue
        others = [m for (other, s), m in newest.items() if other == load and s != "disagg"]
        default = next((m for m in others if m.setup == "agg-default"), None)
        if default is not None:
            rows.append(verdict("itl p99 vs default", ours, default, 1 / 5, ""))
        if others:
            best, how = best_at_equal_ttft(ours, others)
            name = "itl p99 vs best aggregated at equal ttft p90"
            rows.append(verdict(name, ours, best, 1 / 2, how))
    return sorted(rows, key=lambda row: (row["rate"], row["name"]))


def best_at_equal_ttft(ours: Measurement, others: list[Measurement]) -> tuple[Measurement, str]:
    """The aggregated measurement to compare with, and how it was chosen."""
    limit = EQUAL_TTFT * ours.measured["ttft_p90"]
    equal = [m for m in others if m.measured["ttft_p90"] <= limit]
    if equal:
        how = f"lowest ITL p99 of {len(equal)} with TTFT p90 <= {EQUAL_TTFT} x ours"
        return min(equal, key=lambda m: m.measured["itl_p99"]), how
    distance = {m.setup: abs(m.measured["ttft_p90"] - ours.measured["ttft_p90"]) for m in others}
    how = "none has a TTFT p90 as low as ours: the nearest"
    return min(others, key=lambda m: distance[m.setup]), how


def verdict(
    name: str, ours: Measurement, peer: Measurement, goal: float, how: str
) -> dict[str, Any]:
    mine, theirs = ours.measured, peer.measured
    row = {
        "name": f"{name}, {ours.load.rate:g} prompts/s",
        "ours": mine["itl_p99"],
        "peer": theirs["itl_p99"],
        "peer_name": peer.setup,
        "unit": "ms",
        "ratio": round(mine["itl_p99"] / theirs["itl_p99"], 4) if theirs["itl_p99"] else None,
        "goal": goal,
        "rate": ours.load.rate,
        "ttft_p90": [mine["ttft_p90"], theirs["ttft_p90"]],
        "output_tokens_per_s": [mine["output_tokens_per_s"], theirs["output_tokens_per_s"]],
    }
    if how:
        row["chosen"] = how
    if ours.machine != peer.machine:
        row["warning"] = f"measured on different machines: {ours.machine}; {peer.machine}"
    return row


# --- command line ---------------------------------------------------------------------------------


def read_results(path: Path) -> list[Measurement]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=Measurement) for line in lines if line.strip()]


def sweep(options: argparse.Namespace) -> bool:
    """Measure the set-ups that fit into the budget; False if one failed."""
    ends = time.monotonic() + options.budget_s
    start_s, all_well = START_GUESS_S, True
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for setup in options.setups:
        needed = start_s + options.warm_up_s + options.measure_s + SETTLE_S
        if time.monotonic() + needed > ends:
            note(f"no time left for {setup}: name it in another call")
            continue
        began = time.monotonic()
        try:
            for _, measurement in measure_setup(setup, options, ends):
                with options.out.open("ab") as out:
                    out.write(msgspec.json.encode(measurement) + b"\n")
                report(measurement.row())
                start_s = measurement.service["start_s"] + IDLE_S
        except Exception as exc:  # the other set-ups may still do
            all_well = False
            report({"name": setup, "error": f"{type(exc).__name__}: {str(exc)[-1500:]}"})
        note(f"{setup}: {time.monotonic() - began:.0f} s")
    return all_well


def machine(device: str) -> str:
    import torch

    what = f"{os.cpu_count()} cores"
    if device == "cuda":
        what += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{what}, torch {torch.__version__}, boot {boot[:8]}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", default=",".join(SETUPS), help="`disagg`, `agg-default`, agg-N")
    parser.add_argument("--rates", default="1.5", help="long prompts a second, for each set-up")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--stream-prompt", type=int, default=512, help="tokens")
    parser.add_argument("--stream-output", type=int, default=1024, help="tokens")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--warm-up-s", type=float, default=10.0)
    parser.add_argument("--measure-s", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument(
        "--prefill-chunk", type=int, default=8192, help="max_num_batched_tokens of disagg"
    )
    parser.add_argument("--transport", default="ucx", choices=["ucx", "tcp"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--gpus", default="0,1", help="indices")
    parser.add_argument("--engine-dir", type=Path, help="default: made for this run")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "benchmarks" / "disagg.jsonl"
    )
    parser.add_argument(
        "--budget-s", type=float, default=520.0, help="start no measurement that would end later"
    )
    parser.add_argument("--plot", type=Path, help="draw all of --out into this file (matplotlib)")
    parser.add_argument("--verdict", action="store_true", help="measure nothing; judge --out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and load on a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.device, options.streams, options.warm_up_s, options.measure_s = "cpu", 2, 2.0, 5.0
        options.stream_prompt, options.stream_output = 32, 64
        options.prompt_tokens, options.prefill_chunk, options.max_batch_size = 512, 512, 8
    options.setups = options.setups.split(",")
    for setup in options.setups:
        if setup not in SETUPS and not setup.removeprefix("agg-").isdigit():
            parser.error(f"no such set-up: {setup}")
    options.rates = [float(rate) for rate in options.rates.split(",")]
    options.gpus = [int(gpu) for gpu in options.gpus.split(",")] if options.device == "cuda" else []
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.out = options.out.absolute()
    return options


def main() -> None:
    options = arguments()
    all_well = True
    if not options.verdict:
        options.machine = machine(options.device)
        with tempfile.TemporaryDirectory(prefix="dummy-engine-") as folder:
            made = Path(folder, "made")
            if options.engine_dir is None:
                from benchmarks.engines.dummy_engine import make_engine

                make_engine(made, device=options.device, dtype=options.dtype, tiny=options.tiny)
                options.engine_dir = made / "engine"
            options.model_id = str(made)
            all_well = sweep(options)
    measurements = read_results(options.out)
    for row in verdicts(measurements):
        report(row)
    if options.plot:
        from benchmarks.frontier_plot import draw

        draw(list(latest(measurements).values()), options.plot)
        note(f"drawn: {options.plot}")
    if not all_well:
        sys.exit(1)


if __name__ == "__main__":
    main()
