"""The GPUs that a worker may use, and whether the engine was made for them.

Looked at before the library loads anything, because its own errors for these come late and from
deep inside.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from msgspec import Struct

from serving.errors import OperatorError

_QUERY = "--query-gpu=index,uuid,name,compute_cap"
_DEADLINE_S = 30.0


class Gpu(Struct, frozen=True):
    """`compute_capability` as `9.0`."""

    index: str
    uuid: str
    name: str
    compute_capability: str


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[Gpu] | None:
    """Those that CUDA will see, in its order. None when `nvidia-smi` cannot tell."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return select_visible(done.stdout, environ.get("CUDA_VISIBLE_DEVICES"))


def select_visible(listing: str, visible: str | None) -> list[Gpu]:
    """`listing` is the CSV of the query; `visible` is CUDA_VISIBLE_DEVICES, None when unset."""
    rows = (line.split(", ") for line in listing.splitlines())
    gpus = [Gpu(*(part.strip() for part in row)) for row in rows if len(row) == 4]
    if visible is None:
        return gpus
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        found = [g for g in gpus if g.index == name or g.uuid.startswith(name)]
        if not found:
            break  # CUDA ignores everything from the first unknown one on
        chosen.append(found[0])
    return chosen


def check_gpus(gpus: list[Gpu], num_needed: int, stamp: Mapping[str, str]) -> None:
    """Raises OperatorError when there are too few, or when the engine is for another kind.

    `stamp` is the manifest's; only what it says is compared.
    """
    if not gpus:
        raise OperatorError(
            "TensorRT-LLM computes on NVIDIA GPUs, and this worker sees none",
            remedy="start it where `nvidia-smi` lists one; or set `engine.backend: torch`, which "
            "runs on the CPU",
        )
    if num_needed > len(gpus):
        raise OperatorError(
            f"a worker shares its layers among {num_needed} GPUs, and sees {len(gpus)}",
            remedy="lower `workers.tensor_parallel` or `workers.pipeline_parallel`, or give "
            "`workers.gpus` more GPUs",
        )
    built_for = {part.strip() for part in stamp.get("compute_capability", "").split(",")} - {""}
    here = {gpu.compute_capability for gpu in gpus[:num_needed]}
    if built_for and not here <= built_for:
        names = ", ".join(sorted({gpu.name for gpu in gpus[:num_needed]}))
        raise OperatorError(
            f"the engine was built for compute capability {', '.join(sorted(built_for))}, and "
            f"these GPUs ({names}) have {', '.join(sorted(here))}",
            remedy="run the serve target again on this machine: it rebuilds the engine",
        )
