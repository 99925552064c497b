"""A deployment's programs, started for a benchmark without Snakemake or a supervisor.

Each program gets its settings from `topology.plan`, as in a deployment; etcd and NATS are the
tests' own. All of them end with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from integration.services import Etcd, Nats, free_port
from serving.config import Topology, parse
from serving.config.process import WorkerSettings
from serving.config.resolve import resolved_config, with_topology
from serving.deploy.planning.plan import plan_deployment, worker_environment
from serving.deploy.planning.program import Program
from serving.deploy.security.secret_files import NATS_TOKEN_FILE, RPC_SECRET_FILE
from serving.engine.manifest import load_manifest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
START_S = 240.0
STOP_S = 5.0
_PR_SET_PDEATHSIG = 1


class RunningService:
    """Workers and frontend of one topology, ready inside of `with`.

    `sections` are those of `config.yaml`; `gpus` the indices to hand out, none on a CPU.
    """

    def __init__(
        self,
        folder: Path,
        engine_dir: Path,
        topology: Topology,
        sections: dict[str, Any],
        *,
        device: str,
        dtype: str,
        gpus: list[int],
        num_instances: int | None = None,
    ) -> None:
        self._folder, self._engine_dir = folder, engine_dir
        self._topology, self._sections = topology, sections
        self._device, self._dtype, self._gpus = device, dtype, gpus
        self._num_instances = num_instances  # None: one in each worker
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()
        self.port = free_port()
        self.start_s = 0.0

    def __enter__(self) -> RunningService:
        started = time.monotonic()
        try:
            self._start()
            self._wait_ready()
        except BaseException:
            self._stop()
            raise
        self.start_s = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def pids(self) -> dict[str, int]:
        """Of each program."""
        return {name: process.pid for name, process in self._processes.items()}

    def ready(self) -> dict[str, Any]:
        """The body of `/ready`. Raises OSError while nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            content: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return content

    def check_alive(self) -> None:
        """Raises RuntimeError with the last log lines of a program that ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {self._tail(name)}")

    # --- start ---------------------------------------------------------------------------------

    def _start(self) -> None:
        for part in ("run/secrets", "logs", "results/engines"):
            (self._folder / part).mkdir(parents=True)
        with contextlib.redirect_stdout(sys.stderr):  # they print where their binaries come from
            etcd = self._stack.enter_context(Etcd(self._folder / "etcd"))
            nats = self._stack.enter_context(Nats(self._folder / "nats"))
        assert isinstance(etcd, Etcd)
        assert isinstance(nats, Nats)
        (self._folder / NATS_TOKEN_FILE).write_text(nats.token)
        (self._folder / RPC_SECRET_FILE).write_text(secrets.token_urlsafe(32))
        sections = self._sections | {
            "frontend": {"port": self.port, "drain_s": 1} | self._sections.get("frontend", {}),
            "etcd": {"port": int(etcd.endpoint.rpartition(":")[2])},
            "nats": {"port": int(nats.url.rpartition(":")[2])},
            "deployment": {"topology": self._topology, "stop_s": STOP_S - 1},
        }
        fingerprint = load_manifest(self._engine_dir).fingerprint
        (self._folder / "results" / "engines" / fingerprint).symlink_to(self._engine_dir.resolve())
        config = resolved_config(
            with_topology(parse(sections), self._topology),
            device=self._device,
            dtype=self._dtype,
            engine_fingerprint=fingerprint,
            model_key="",
        )
        planned = plan_deployment(config, gpus=self._gpus, code={"worker": "", "frontend": ""})
        cores = len(os.sched_getaffinity(0))
        for program in planned.programs:
            if program.name == "frontend":
                self._spawn(program, {})
            elif program.name.startswith("worker-"):
                worker = msgspec.json.decode(program.settings, type=WorkerSettings)
                self._spawn(program, worker_environment(config, worker, self._gpus, cores))

    def _spawn(self, program: Program, environment: dict[str, str]) -> None:
        settings = self._folder / program.settings_file
        settings.write_text(program.settings)
        paths = [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        with self._log(program.name).open("wb") as log:
            self._processes[program.name] = subprocess.Popen(
                [part.replace("{python}", sys.executable) for part in program.command],
                cwd=self._folder,
                env={**os.environ, **own, **environment, "LAUNCH_ID": program.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            self.check_alive()
            with contextlib.suppress(OSError, ValueError):
                state = self.ready()
                expected = self._num_instances or len(self._processes) - 1
                if state["ready"] and len(state["instances"]) == expected:
                    return
            if time.monotonic() > deadline:
                tails = "; ".join(f"{name}: {self._tail(name)}" for name in self._processes)
                raise RuntimeError(f"not ready after {START_S:g} s: {tails}")
            time.sleep(0.1)

    # --- end -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        for names in (["frontend"], [name for name in self._processes if name != "frontend"]):
            ending = [self._processes[name] for name in names if name in self._processes]
            for process in ending:
                process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            for process in ending:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                process.kill()
                process.wait()
        self._stack.close()

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _tail(self, name: str) -> str:
        return " | ".join(self._log(name).read_text(errors="replace").splitlines()[-12:])


def end_with_parent() -> None:
    """In the child, before it is a program of its own: a GPU must not stay taken by an orphan."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
