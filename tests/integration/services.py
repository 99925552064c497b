"""Private etcd and nats-server processes for tests, to be killed and restarted at will."""

from __future__ import annotations

import functools
import json
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path

from serving.deploy.binaries.etcd import resolve_etcd
from serving.deploy.binaries.nats import resolve_nats

START_S = 30.0
CACHE = Path(__file__).parents[2] / "results" / "bin" / "cache"
"""Shared with this checkout's own deployment, so that etcd is fetched once."""


@functools.cache
def etcd_executable() -> Path:
    """The etcd of all tests, found or fetched by the first that asks.

    Every test process asks for it outside of network namespaces, where nothing can be fetched.
    """
    return resolve_etcd(CACHE, report=print).path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Service(ABC):
    """One server process with its data in a folder. A context manager; `start` waits until ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Raises OSError or returns False while it is not ready."""

    def start(self) -> None:
        log = self.folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(self.command(), stdout=out, stderr=out)
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            assert self._process.poll() is None, f"died: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"not ready: {log.read_text()[-2000:]}"
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            return self.answers()
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, signum: int) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Etcd(Service):
    """`endpoint` is host:port."""

    def __init__(self, folder: Path, executable: Path | None = None) -> None:
        super().__init__(folder)
        self._binary = executable or etcd_executable()
        self._client, self._peer = free_port(), free_port()
        self.endpoint = f"127.0.0.1:{self._client}"

    def command(self) -> list[str]:
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer}"
        options = {
            "name": "test",
            "data-dir": str(self.folder / "data"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"test={peer}",
            "heartbeat-interval": "50",
            "election-timeout": "250",
        }
        return [str(self._binary), *(f"--{name}={value}" for name, value in options.items())]

    def answers(self) -> bool:
        with urllib.request.urlopen(f"http://{self.endpoint}/health", timeout=1) as reply:
            return bool(json.load(reply)["health"] == "true")

    def wipe(self) -> None:
        """Forget everything; only while it is not running."""
        assert self._process is None
        shutil.rmtree(self.folder / "data")


class Nats(Service):
    """`url` and `token` are for clients; `write_config` may change the server's options."""

    def __init__(self, folder: Path, **options: object) -> None:
        super().__init__(folder)
        self._binary, self._port = resolve_nats().path, free_port()
        self.url = f"nats://127.0.0.1:{self._port}"
        self.token = secrets.token_hex(16)
        self.options = options

    def command(self) -> list[str]:
        lines = [
            f"host: 127.0.0.1\nport: {self._port}",
            f'authorization {{ token: "{self.token}" }}',
            *(f"{name}: {value}" for name, value in self.options.items()),
        ]
        config = self.folder / "nats.conf"
        config.touch(mode=0o600)
        config.write_text("\n".join(lines))
        return [str(self._binary), "-c", str(config)]

    def answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self._port), timeout=1) as probe:
            return probe.recv(5) == b"INFO "
