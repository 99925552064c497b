"""Other projects' frontends and routers, started as documented, each in its own environment.

`envs/dynamo.txt` and `envs/routers.txt` say how those are made. All processes end with this one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load.http_load import Shape, encode
from benchmarks.load.running_service import end_with_parent
from benchmarks.peers.dummy_backend import MODEL
from integration.services import Etcd, Nats, free_port
from serving.protocol import InstanceInfo

START_S = 60.0


class Serving:
    """A server to load: where it listens, what its model is called, whose CPU time counts.

    `worker` is one of those behind it, if it can be asked directly, with `secret`.
    """

    def __init__(
        self,
        port: int,
        model: str,
        pid: int,
        worker: InstanceInfo | None = None,
        secret: bytes = b"",
    ) -> None:
        self.port, self.model, self.pid = port, model, pid
        self.worker, self.secret = worker, secret


@contextlib.contextmanager
def dynamo(python: Path, model: Path, folder: Path, num_workers: int) -> Iterator[Serving]:
    """Dynamo's frontend, KV routing, before mock workers that take no time."""
    folder.mkdir(parents=True)
    port = free_port()
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # they print where their binaries come from
            etcd = stack.enter_context(Etcd(folder / "etcd"))
            nats = stack.enter_context(Nats(folder / "nats"))
        assert isinstance(etcd, Etcd)
        assert isinstance(nats, Nats)
        environment = {
            "ETCD_ENDPOINTS": f"http://{etcd.endpoint}",
            "NATS_SERVER": nats.url,
            "NATS_AUTH_TOKEN": nats.token,
            "HF_HUB_OFFLINE": "1",
            "DYN_LOG": "warn",
        }
        common = ["--discovery-backend", "etcd", "--request-plane", "tcp", "--event-plane", "nats"]
        mocker = [
            *("--model-path", str(model), "--model-name", MODEL, "--num-workers", str(num_workers)),
            # 0 would pace like 1, whatever its help says.
            *("--speedup-ratio", "1000000", "--block-size", "16", *common),
        ]
        frontend = [
            *("--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv"),
            *("--kv-cache-block-size", "16", *common),
        ]
        start = _Start(stack, folder, environment)
        start("mocker", [str(python), "-m", "dynamo.mocker", *mocker])
        pid = start("frontend", [str(python), "-m", "dynamo.frontend", *frontend])
        start.wait(port, MODEL)
        yield Serving(port, MODEL, pid)


@contextlib.contextmanager
def router(python: Path, module: list[str], folder: Path, backends: list[int]) -> Iterator[Serving]:
    """A router of SGLang's family before HTTP backends, cache-aware, no retries to confuse it."""
    folder.mkdir(parents=True)
    port, metrics_port = free_port(), free_port()
    options = [
        *("--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"),
        *("--prometheus-port", str(metrics_port), "--log-level", "warn", "--worker-urls"),
        *(f"http://127.0.0.1:{backend}" for backend in backends),
    ]
    with contextlib.ExitStack() as stack:
        start = _Start(stack, folder, {})
        pid = start("router", [str(python), "-m", *module, *options])
        start.wait(port, MODEL)
        yield Serving(port, MODEL, pid)


@contextlib.contextmanager
def backends(folder: Path, count: int) -> Iterator[list[Serving]]:
    """HTTP servers that answer at once."""
    folder.mkdir(parents=True)
    script = Path(__file__).with_name("dummy_backend.py")
    with contextlib.ExitStack() as stack:
        start = _Start(stack, folder, {})
        started = []
        for number in range(count):
            port = free_port()
            pid = start(f"backend-{number}", [sys.executable, str(script), str(port)])
            start.wait(port, MODEL)
            started.append(Serving(port, MODEL, pid))
        yield started


class _Start:
    """Starts programs that end with `stack`."""

    def __init__(
        self, stack: contextlib.ExitStack, folder: Path, environment: dict[str, str]
    ) -> None:
        self._stack, self._folder = stack, folder
        self._environment = {**os.environ, **environment}
        self._environment.pop("PYTHONPATH", None)  # it is ours, and their versions differ
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(self, name: str, command: list[str]) -> int:
        """Returns the process id."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )
        self._processes[name] = process
        self._stack.callback(_end, process)
        return process.pid

    def wait(self, port: int, model: str) -> None:
        """Until a completion is answered. Raises RuntimeError."""
        deadline = time.monotonic() + START_S
        while not answers(port, model):
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {self._tail(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody answers: {'; '.join(map(self._tail, self._processes))}")
            time.sleep(0.2)

    def _tail(self, name: str) -> str:
        lines = (self._folder / f"{name}.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-12:])


def answers(port: int, model: str) -> bool:
    """Whether a completion of one token succeeds now."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(encode(model, Shape(1, stream=False)))
            return client.recv(4096).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
