"""Test code. Failures on demand: `STANDIN_TRTLLM_FAIL`.

oom        the engine does not fit: the constructor raises
no_gpu     no GPU is there: the constructor raises
fetch      every fetch of a context's KV fails
hang       after the first request nothing comes any more; `hang:N` after N requests,
           `hang@FILE` while FILE exists
slow_fetch@FILE
           while FILE exists, each fetch waits as many seconds as it says
"""

from __future__ import annotations

import os
from pathlib import Path

MESSAGES = {
    "oom": "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "79.11 GiB of which 1.02 GiB is free.",
    "no_gpu": "No CUDA GPUs are available",
}


def wanted() -> str:
    return os.environ.get("STANDIN_TRTLLM_FAIL", "")


def raise_at_start() -> None:
    """As the real constructor does: the cause is behind an error that says nothing."""
    kind = wanted()
    if kind == "oom":
        import torch

        raise RuntimeError("Executor worker returned error") from torch.OutOfMemoryError(
            MESSAGES[kind]
        )
    if kind == "no_gpu":
        raise RuntimeError("Executor worker returned error") from RuntimeError(MESSAGES[kind])


def hangs(num_requests: int) -> bool:
    """Whether the request after `num_requests` earlier ones gets no answer."""
    kind = wanted()
    if kind.startswith("hang@"):
        return Path(kind.removeprefix("hang@")).exists()
    if kind.startswith("hang"):
        return num_requests >= int(kind.partition(":")[2] or 1)
    return False


def fetch_s() -> float:
    """Seconds to wait before a fetch."""
    kind = wanted()
    file = Path(kind.removeprefix("slow_fetch@"))
    return float(file.read_text()) if kind.startswith("slow_fetch@") and file.exists() else 0.0


def num_gpus() -> int:
    """Devices that it pretends to see: those of CUDA_VISIBLE_DEVICES, else eight."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return 8 if visible is None else len([each for each in visible.split(",") if each.strip()])
