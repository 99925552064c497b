"""Draw benchmarks: `plot_bench.py OUT_FOLDER RESULT_FOLDER...`, the newest first.

Runs in the environment of aiperf, which has matplotlib, and imports nothing of the service.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

MOST_LABELS = 16


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def over_time(folders: list[Path], key: str, title: str, out: Path) -> None:
    """A dot a request, and beside it the share of requests that were at most so slow."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for folder in folders:
        rows = [row for row in load(folder, "requests") if key in row]
        left.plot([row["start_s"] for row in rows], [row[key] for row in rows], ".", ms=4)
        values = sorted(row[key] for row in rows)
        shares = [(place + 1) / len(values) for place in range(len(values))]
        right.step(values, shares, where="post", label=folder.name)
    left.set(xlabel="start of the request (s)", ylabel=f"{title} (ms)", ylim=(0, None))
    right.set(xlabel=f"{title} (ms)", ylabel="share of requests", ylim=(0, 1.02))
    right.legend()
    save(figure, out)


def throughput(folders: list[Path], out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for folder in folders:
        samples = load(folder, "samples")
        times = [sample["at_s"] for sample in samples]
        rates = [
            (after["generated_tokens"] - before["generated_tokens"])
            / max(1e-9, after["at_s"] - before["at_s"])
            for before, after in pairwise(samples)
        ]
        left.step(times[1:], rates, label=folder.name)
        right.step(times, [sample["in_flight"] for sample in samples], label=folder.name)
    left.set(xlabel="time (s)", ylabel="output tokens/s", ylim=(0, None))
    right.set(xlabel="time (s)", ylabel="requests in flight", ylim=(0, None))
    left.legend()
    save(figure, out)


def hit_rate(folder: Path, out: Path) -> None:
    """Of each instance up to each moment, since the benchmark began."""
    samples = load(folder, "samples")
    figure, axes = plt.subplots(figsize=(10, 4))
    first = samples[0]
    for instance in sorted(samples[-1]["routed_tokens"]):
        times, rates = [], []
        for sample in samples[1:]:
            routed, hit = (
                sample[key].get(instance, 0) - first[key].get(instance, 0)
                for key in ("routed_tokens", "hit_tokens")
            )
            if routed:
                times.append(sample["at_s"])
                rates.append(hit / routed)
        axes.step(times, rates, where="post", label=instance)
    axes.set(xlabel="time (s)", ylabel="hit rate so far", ylim=(0, 1))
    if len(samples[-1]["routed_tokens"]) <= MOST_LABELS:
        axes.legend()
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    out, folders = Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]
    over_time(folders, "ttft_ms", "time to first token", out / "ttft.svg")
    over_time(folders, "itl_ms", "inter-token latency, mean of a request", out / "itl.svg")
    throughput(folders, out / "throughput.svg")
    hit_rate(folders[0], out / "hit_rate.svg")
