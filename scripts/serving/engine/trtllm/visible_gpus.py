"""The GPUs that a worker may use, and whether the engine was made for them.

Checked before the library loads anything, because its own errors about GPUs come late and from
deep inside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from serving.errors import OperatorError
from serving.gpus import Gpu, installed_gpus


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[Gpu] | None:
    """The GPUs that CUDA will see, in its order. None when the driver does not answer."""
    gpus = installed_gpus()
    return None if gpus is None else select_visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))


def select_visible(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """`visible` is CUDA_VISIBLE_DEVICES: indices or the beginnings of UUIDs; None when unset."""
    if visible is None:
        return list(gpus)
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        found = [gpu for gpu in gpus if str(gpu.index) == name or gpu.uuid.startswith(name)]
        if not found:
            break  # CUDA ignores the first unknown entry and everything after it
        chosen.append(found[0])
    return chosen


def check_gpus(gpus: Sequence[Gpu], num_needed: int, stamp: Mapping[str, str]) -> None:
    """Raises OperatorError for too few GPUs, or when the engine was built for another kind.

    `stamp` is the manifest's; a missing entry is not compared.
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
