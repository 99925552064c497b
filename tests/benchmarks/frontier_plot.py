"""The TTFT, ITL and throughput frontier of `disagg.py`, drawn."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

_AXES = (
    ("ttft_p90", "itl_p99", "TTFT p90 of long prompts (ms)", "ITL p99 of steady streams (ms)"),
    ("output_tokens_per_s", "itl_p99", "output tokens/s", "ITL p99 of steady streams (ms)"),
    ("output_tokens_per_s", "ttft_p90", "output tokens/s", "TTFT p90 of long prompts (ms)"),
)


def draw(measurements: list[Any], path: Path) -> None:
    """A line for each set-up, a point for each rate. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_setup: dict[str, list[Any]] = defaultdict(list)
    for measurement in sorted(measurements, key=lambda m: m.load.rate):
        by_setup[measurement.setup].append(measurement)
    figure, panels = pyplot.subplots(1, len(_AXES), figsize=(6 * len(_AXES), 5))
    for panel, (x, y, x_label, y_label) in zip(panels, _AXES, strict=True):
        for setup, points in sorted(by_setup.items()):
            ours = setup == "disagg"
            panel.plot(
                [p.measured[x] for p in points],
                [p.measured[y] for p in points],
                marker="o" if ours else "x",
                linewidth=2.5 if ours else 1,
                label=setup,
            )
            for point in points:
                at = (point.measured[x], point.measured[y])
                panel.annotate(f"{point.load.rate:g}/s", at, fontsize=7)
        panel.set_yscale("log")
        if x == "ttft_p90":
            panel.set_xscale("log")
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].legend()
    load = measurements[0].load
    figure.suptitle(
        f"{load.streams} streams of {load.stream_prompt} + {load.stream_output} tokens, prompts of "
        f"{load.prompt} tokens arriving; {measurements[0].machine}"
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
