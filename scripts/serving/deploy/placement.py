"""Which GPU a worker gets. Adding a worker of one role never moves another worker.

Prefill (and agg) workers take the GPUs in order from the front, decode workers from the back, so
that with two GPUs the roles are apart and a restart is never needed to make room.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.errors import ConfigError
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
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which names GPUs by something else than indices",
            remedy="set it to indices such as 0,1, or unset it",
        )
    return [int(part) for part in parts if int(part) in present]


def usable_gpus(wanted: Sequence[int] | None, existing: Sequence[int]) -> list[int]:
    """The GPUs to hand out. Raises ConfigError when more are asked for than exist."""
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
        raise ConfigError(
            "engine.device",
            "cuda, but there is no GPU to use",
            remedy="set `engine.device: cpu`, or check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return gpus


def place(role: Role, index: int, gpus: Sequence[int]) -> int:
    """The GPU of worker `{role}-{index}`; workers share when there are more of them than GPUs."""
    return gpus[-(index % len(gpus)) - 1] if role == "decode" else gpus[index % len(gpus)]


def visible_order(gpu: int, gpus: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a worker: its own GPU first, as device 0, then those of its peers.

    A peer's memory can only be opened over cuda_ipc when its GPU is visible too.
    """
    return ",".join(map(str, [gpu, *(other for other in gpus if other != gpu)]))
