"""Is this machine fit for the deployment: interpreter, memory, disk, limits, sockets.

`observe_host` looks at the machine once; `judge_host` decides from these facts and the config.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import psutil
from msgspec import Struct

from serving.config import Config
from serving.deploy.checks.findings import Finding
from serving.deploy.model.files import local_files
from serving.deploy.planning.device import resolve_dtype
from serving.deploy.planning.fingerprint import resolve_source
from serving.engine.files import human
from serving.host_memory import host_memory
from serving.kv_transfer.transports.nixl import REMEDY as NIXL_REMEDY
from serving.kv_transfer.transports.nixl import nixl_module

PARAMETER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
RUNTIME_BYTES = 600 * 10**6
"""Resident size of a worker without its weights: interpreter, torch, UCX (measured: 0.5 GB)."""
MINIMUM_DISK_BYTES = 500 * 10**6
_SCALE = {"M": 10**6, "B": 10**9, "T": 10**12}


class HostFacts(Struct, frozen=True, kw_only=True):
    """The machine as observed. Sizes in bytes; an error text is empty when the trial worked."""

    python: tuple[int, int]
    system: str
    machine: str
    cores: int
    memory_total: int
    memory_available: int
    disk_free: int
    open_files: int
    memlock: int
    has_infiniband: bool
    unix_socket_error: str
    loopback_error: str
    nixl: str = ""


def observe_host(run_dir: Path) -> HostFacts:
    """Look at this machine. Leaves no files; `run_dir` is created if missing."""
    memory = host_memory()
    infiniband = Path("/sys/class/infiniband")
    return HostFacts(
        python=sys.version_info[:2],
        system=platform.system(),
        machine=platform.machine(),
        cores=len(psutil.Process().cpu_affinity()),
        memory_total=memory.total,
        memory_available=memory.available,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        nixl=nixl_module(),
        has_infiniband=infiniband.is_dir() and any(infiniband.iterdir()),
        unix_socket_error=_try_unix_socket(run_dir),
        loopback_error=_try_loopback(),
    )


def _try_unix_socket(run_dir: Path) -> str:
    """Bind a socket in `run_dir`: some network and shared folders refuse, though files work.

    The path is relative, as the deployment's are: absolute ones may exceed the 107-byte limit.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run_dir, prefix="check-") as folder:
            path = os.path.relpath(Path(folder, "s"))
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(path)
    except OSError as exc:
        return str(exc)
    return ""


def _try_loopback() -> str:
    """Send a byte to ourselves over 127.0.0.1."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname(), timeout=5) as client,
        ):
            listener.settimeout(5)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(5)
                client.sendall(b"x")
                return "" if peer.recv(1) == b"x" else "a byte sent was not received"
    except OSError as exc:
        return str(exc)


def weight_bytes(config: Config) -> int | None:
    """Size of the loaded weights: a local model's files, else what `135M` in the name implies.

    None when neither is known. Raises ConfigError for a local model that does not exist.
    """
    if config.engine.backend == "mock":
        return 0
    if resolve_source(config.model) == "local" and config.engine.weights == "real":
        found = local_files(config.model)
        return sum((found.folder / name).stat().st_size for name in found.names)
    match = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MBT])(?![A-Za-z])", config.model.id)
    if not match:
        return None
    return int(float(match[1]) * _SCALE[match[2]] * PARAMETER_BYTES[resolve_dtype(config)])


def judge_host(config: Config, num_workers: int, device: str, facts: HostFacts) -> list[Finding]:
    """Findings about everything that `num_workers` workers need of the machine."""
    weights = weight_bytes(config)
    stored = (
        0 if config.engine.weights == "dummy" else weights
    )  # dummy weights exist in workers only
    return [
        Finding(
            "python",
            facts.python >= (3, 11),
            f"{facts.python[0]}.{facts.python[1]}",
            "install Python 3.11 or newer and set up the environment with it",
        ),
        Finding(
            "platform",
            facts.system == "Linux" and facts.machine in ("x86_64", "aarch64"),
            f"{facts.system} on {facts.machine}",
            "serve on 64-bit Linux; UCX, etcd and NATS are started from Linux builds",
        ),
        Finding(
            "cores",
            facts.cores >= num_workers or device == "cuda",
            f"{facts.cores} usable cores for {num_workers} workers",
            "lower the counts under `workers`, or expect them to slow each other down",
            warning=True,
        ),
        _memory(stored if device == "cuda" else weights, num_workers, device, facts),
        _disk(stored, facts),
        _open_files(config, facts),
        _memlock(config, facts),
        *_nixl(config, facts),
        Finding(
            "unix sockets",
            not facts.unix_socket_error,
            facts.unix_socket_error or "can be bound in run/",
            "work in a folder on a local disk that you may write to",
        ),
        Finding(
            "loopback",
            not facts.loopback_error,
            facts.loopback_error or "127.0.0.1 carries data",
            "bring the interface up: `ip link set lo up`",
        ),
    ]


def _memory(weights: int | None, num_workers: int, device: str, facts: HostFacts) -> Finding:
    available = f"{human(facts.memory_available)} of {human(facts.memory_total)} free"
    if weights is None:
        return Finding("memory", True, f"{available}; the size of the model is not known yet")
    # With a GPU the host only stages the weights; workers may do so at the same time.
    needed = num_workers * (RUNTIME_BYTES + weights)
    kind = "weights on their way to the GPU" if device == "cuda" else "weights and runtime"
    detail = f"{available}; {num_workers} workers need about {human(needed)} for {kind}"
    remedy = "choose a smaller model or fewer workers, or set engine.dtype to bfloat16"
    if needed > facts.memory_total:
        return Finding("memory", False, detail, remedy)
    return Finding("memory", needed <= facts.memory_available, detail, remedy, warning=True)


def _disk(weights: int | None, facts: HostFacts) -> Finding:
    # The download and the packed engine are both kept.
    needed = MINIMUM_DISK_BYTES + 2 * (weights or 0)
    detail = f"{human(facts.disk_free)} free, about {human(needed)} wanted for results/"
    remedy = "free some space, or work in a folder on a larger disk"
    if facts.disk_free < MINIMUM_DISK_BYTES:
        return Finding("disk", False, detail, remedy)
    return Finding("disk", facts.disk_free >= needed, detail, remedy, warning=True)


def _open_files(config: Config, facts: HostFacts) -> Finding:
    needed = config.frontend.max_inflight + 512
    unlimited = facts.open_files == resource.RLIM_INFINITY
    return Finding(
        "open files",
        unlimited or facts.open_files >= needed,
        f"limit {'none' if unlimited else facts.open_files}, {needed} wanted for "
        f"frontend.max_inflight {config.frontend.max_inflight}",
        f"`ulimit -n {max(needed, 65536)}` before snakemake, or lower frontend.max_inflight",
        warning=facts.open_files >= 256,
    )


def _memlock(config: Config, facts: HostFacts) -> Finding:
    if config.kv_transfer.transport == "tcp" or not facts.has_infiniband:
        return Finding("locked memory", True, "not needed: no InfiniBand device in use")
    unlimited = facts.memlock == resource.RLIM_INFINITY
    return Finding(
        "locked memory",
        unlimited,
        f"limit {'none' if unlimited else facts.memlock} bytes; InfiniBand registers its buffers",
        "`ulimit -l unlimited`, or a memlock line in /etc/security/limits.conf",
        warning=True,
    )


def _nixl(config: Config, facts: HostFacts) -> list[Finding]:
    """TensorRT-LLM has its own; for the torch engine it is an option that must be installed."""
    if (config.kv_transfer.transport, config.engine.backend) != ("nixl", "torch"):
        return []
    contained = config.container.runtime != "none"
    return [
        Finding(
            "nixl",
            bool(facts.nixl) or contained,
            "expected in the image" if contained else facts.nixl or "not installed",
            NIXL_REMEDY,
        )
    ]
