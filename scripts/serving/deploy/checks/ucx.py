"""Does UCX carry KV blocks between two processes here? Start it, move bytes, compare them.

The trial runs in two child processes (`ucx_probe`). A broken UCX may crash or hang its process, and
two processes use other transports than one.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from msgspec import Struct

from serving.config import Config
from serving.deploy.checks.findings import Finding

PROBE_S = 60.0
_PROBE = [sys.executable, "-m", "serving.deploy.checks.ucx_probe"]
_LANES = re.compile(r"\btag\(([^)]*)\)")


class UcxFacts(Struct, frozen=True, kw_only=True):
    """The outcome of the trial. `transports` are `transport/device` as UCX names them."""

    version: str
    error: str = ""
    equal: bool = False
    num_bytes: int = 0
    seconds: float = 0.0
    transports: list[str] = []


def try_ucx() -> UcxFacts:
    """Run the trial. Never raises: what went wrong is in `error`."""
    version = _version()
    if not version:
        return UcxFacts(version="", error="the Python package ucxx is not installed")
    with tempfile.TemporaryDirectory(prefix="check-ucx-") as folder:
        log = Path(folder, "pull.log")
        server = subprocess.Popen(
            [*_PROBE, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(Path(folder, "serve.log")),
        )
        try:
            address = _first_line(server)
            pulled = _pull(address, log) if address.startswith("ucx://") else None
        finally:
            complaint = _end(server)
        if pulled is None:
            return UcxFacts(version=version, error=_last_line(complaint))
        if pulled.returncode != 0:
            return UcxFacts(version=version, error=_last_line(pulled.stderr))
        found = json.loads(pulled.stdout.splitlines()[-1])
        return UcxFacts(
            version=version,
            equal=found["equal"],
            num_bytes=found["bytes"],
            seconds=found["seconds"],
            transports=_transports(log),
        )


def _pull(address: str, log: Path) -> subprocess.CompletedProcess[str]:
    command = [*_PROBE, "pull", address]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
            env=_environment(log),
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no transfer within {PROBE_S:g} s")


def _version() -> str:
    """Name and version of the installed build: its name contains the CUDA release."""
    for name in ("ucxx-cu13", "ucxx-cu12", "ucxx"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def _environment(log: Path) -> dict[str, str]:
    """At level `info` UCX logs the transports of a connection, here into a file of its own."""
    package_parent = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": str(log)}


def _first_line(process: subprocess.Popen[str]) -> str:
    """The first line that the process prints; empty when it ends or stays silent."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], PROBE_S)
    return process.stdout.readline().strip() if readable else ""


def _end(process: subprocess.Popen[str]) -> str:
    """Close its input, which ends it, and kill it if it goes on. Returns its stderr."""
    try:
        return process.communicate(timeout=10)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[1]


def _transports(log: Path) -> list[str]:
    text = log.read_text(errors="replace") if log.exists() else ""
    return sorted({lane for lanes in _LANES.findall(text) for lane in lanes.split()})


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a message"


def judge_ucx(config: Config, disaggregated: bool, facts: UcxFacts) -> list[Finding]:
    """UCX must work where KV travels over it. Elsewhere a broken UCX is only a warning."""
    needed = disaggregated and config.kv_transfer.transport == "ucx"
    remedy = (
        "reinstall with `pip install -c envs/constraints.txt .`; see what UCX finds with "
        "`UCX_LOG_LEVEL=info`; or set kv_transfer.transport to tcp"
    )
    if facts.error:
        return [Finding("ucx", False, facts.error, remedy, warning=not needed)]
    rate = facts.num_bytes / max(facts.seconds, 1e-9) / 1e6
    return [
        Finding("ucx", True, facts.version),
        Finding(
            "round trip",
            facts.equal,
            f"{facts.num_bytes} bytes between two processes at {rate:.0f} MB/s, "
            + ("contents equal" if facts.equal else "contents DIFFER"),
            remedy,
            warning=not needed,
        ),
        Finding(
            "transports",
            bool(facts.transports),
            ", ".join(facts.transports) or "UCX logged none",
            "unset UCX_TLS and UCX_NET_DEVICES, or name transports that exist here",
            warning=True,
        ),
    ]
