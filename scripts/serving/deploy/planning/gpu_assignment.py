"""Which GPUs each worker gets. One more worker of a role never moves another worker.

Prefill (and agg) workers take GPUs in order from the front, decode workers from the back, so that
with two GPUs the roles are apart and a restart is never needed to make room. A worker that needs
several GPUs gets neighbours in that order, which puts GPUs joined by NVLink side by side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.config import Config
from serving.config.resolve import gpus_per_worker, worker_counts
from serving.deploy.planning.nvlink import all_joined, islands
from serving.errors import ConfigError
from serving.gpus import Links
from serving.protocol import Role


def existing_gpus(
    environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[int]:
    """Indices of the GPUs this deployment may use, without loading CUDA.

    `CUDA_VISIBLE_DEVICES` narrows them, as it does for every CUDA program.
    """
    present = sorted(
        int(match.group(1))
        for device in devices.glob("nvidia[0-9]*")
        if (match := re.fullmatch(r"nvidia(\d+)", device.name))
    )
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    parts = [part.strip() for part in visible.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(
            "workers.gpus",
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which does not name GPUs by index",
            remedy="set it to indices such as 0,1, or unset it",
        )
    return [int(part) for part in parts if int(part) in present]


def usable_gpus(
    wanted: Sequence[int] | None, existing: Sequence[int], backend: str = "torch"
) -> list[int]:
    """The GPUs to hand out. Raises ConfigError when `wanted` names a missing one, or none exist."""
    if wanted is None:
        gpus = list(existing)
    else:
        missing = [gpu for gpu in wanted if gpu not in existing]
        if missing:
            there = ", ".join(map(str, existing)) or "none"
            raise ConfigError(
                "workers.gpus",
                f"GPU {', '.join(map(str, missing))} does not exist (there: {there})",
                remedy="name GPUs that exist, or remove the key to use all of them",
            )
        gpus = list(dict.fromkeys(wanted))
    if not gpus:
        raise _no_gpu(backend)
    return gpus


def _no_gpu(backend: str) -> ConfigError:
    if backend == "tensorrt_llm":
        return ConfigError(
            "engine.device",
            "TensorRT-LLM runs on NVIDIA GPUs, and there is no GPU to use: no /dev/nvidia* that "
            "CUDA_VISIBLE_DEVICES leaves visible",
            remedy="check that `nvidia-smi` lists GPUs and that CUDA_VISIBLE_DEVICES is unset or "
            "right; without GPUs, set `engine.backend: torch`",
        )
    return ConfigError(
        "engine.device",
        "cuda, but there is no GPU to use",
        remedy="set `engine.device: cpu`, or check nvidia-smi and CUDA_VISIBLE_DEVICES",
    )


def assign_gpus(
    config: Config, gpus: Sequence[int], nvlinks: Links = frozenset()
) -> dict[tuple[Role, int], list[int]]:
    """The GPUs of each worker by role and index. Raises ConfigError when there are too few."""
    sizes, counts = gpus_per_worker(config), worker_counts(config)
    engine = config.engine
    may_share = engine.backend == "torch" or engine.kv_cache_tokens is not None
    require_enough_gpus(counts, sizes, gpus, may_share=may_share)
    return {
        (role, index): gpus_of_worker(role, index, gpus, sizes, nvlinks)
        for role, count in counts.items()
        for index in range(count)
    }


def gpus_of_worker(
    role: Role,
    index: int,
    gpus: Sequence[int],
    sizes: Mapping[Role, int] | None = None,
    nvlinks: Links = frozenset(),
) -> list[int]:
    """The GPUs of worker `{role}-{index}`, as many as `sizes[role]` (default: one).

    `sizes` has the roles that are deployed together. The result depends on them, and not on the
    number of workers. Past the last GPU it starts over, so that workers share; `require_enough_gpus`
    refuses where they must not.
    """
    sizes = sizes or {role: 1}
    size = sizes[role]
    order = order_by_nvlink(gpus, sizes, nvlinks)
    if role == "decode":
        order.reverse()
    slots = len(order) // size
    if slots == 0:
        raise _too_few(role, size, gpus)
    first = index % slots * size
    taken = order[first : first + size]
    return taken[::-1] if role == "decode" else taken


def order_by_nvlink(gpus: Sequence[int], sizes: Mapping[Role, int], nvlinks: Links) -> list[int]:
    """`gpus` in the order to hand out, with GPUs that NVLink joins side by side.

    Islands come in the given order, the largest first or the smallest first. The best order is the
    one in which the most workers get GPUs that are all joined; the first worker of each role counts
    most.
    """
    given = islands(gpus, nvlinks) if max(sizes.values()) > 1 else [list(gpus)]
    orders = [
        [gpu for island in arranged for gpu in island]
        for arranged in (given, sorted(given, key=len, reverse=True), sorted(given, key=len))
    ]

    def num_joined_workers(order: list[int]) -> tuple[int, int]:
        firsts = total = 0
        for role, size in sizes.items():
            own = order[::-1] if role == "decode" else order
            groups = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
            whole = [size > 1 and all_joined(group, nvlinks) for group in groups]
            firsts += bool(whole and whole[0])
            total += sum(whole)
        return firsts, total

    return max(orders, key=num_joined_workers)  # the first of equals: the given order


def require_enough_gpus(
    counts: Mapping[Role, int],
    sizes: Mapping[Role, int],
    gpus: Sequence[int],
    *,
    may_share: bool,
) -> None:
    """Raises ConfigError when the workers need more GPUs than there are.

    Workers of one GPU each `may_share`: the torch engine sizes its pool from what is free.
    """
    for role, size in sizes.items():
        if size > len(gpus):
            raise _too_few(role, size, gpus)
    needed = sum(counts[role] * size for role, size in sizes.items())
    if needed <= len(gpus) or (may_share and max(sizes.values()) == 1):
        return
    each = ", ".join(f"{counts[role]} {role} of {size}" for role, size in sizes.items())
    alone = max(sizes.values()) == 1
    raise ConfigError(
        "workers.gpus",
        f"the workers need {needed} GPUs ({each}), but {len(gpus)} can be handed out: TensorRT-LLM "
        "takes most of a GPU's memory, so each worker needs GPUs of its own",
        remedy="lower the counts under `workers`"
        + (
            ", or bound each KV pool with `engine.kv_cache_tokens`: then workers share GPUs"
            if alone
            else ", `workers.tensor_parallel` or `workers.pipeline_parallel`, or name more GPUs"
        ),
    )


def _too_few(role: Role, size: int, gpus: Sequence[int]) -> ConfigError:
    return ConfigError(
        "workers.tensor_parallel",
        f"each {role} worker needs {size} GPUs (tensor times pipeline parallel), but "
        f"{len(gpus)} can be handed out",
        remedy=f"lower `workers.tensor_parallel` or `workers.pipeline_parallel` of {role} until "
        f"their product is at most {len(gpus)}, or name more GPUs in `workers.gpus`",
    )


def visible_order(own: Sequence[int], gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a worker: its own GPUs first, from device 0, then its peers'.

    A peer's memory can only be opened over cuda_ipc when its GPU is visible too.
    """
    return ",".join(map(str, [*own, *(other for other in gpus if other not in own)]))
