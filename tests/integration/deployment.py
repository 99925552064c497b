"""A real deployment in a folder of its own, driven the way a person does: by `snakemake`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from integration.services import etcd_executable

REPO = Path(__file__).resolve().parents[2]
SNAKEMAKE_S = 280


def free_ports(count: int) -> list[int]:
    """Distinct ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Deployment:
    """Owns a directory with `config.yaml`, `results/`, `run/` and `logs/`."""

    def __init__(self, directory: Path, model: str | None = None, **sections: Any) -> None:
        self.directory = directory
        self.environment: dict[str, str] = {}  # what this person has set
        self.prefix: list[str] = []  # runs a command on the machine that this is deployed on
        directory.mkdir(parents=True, exist_ok=True)
        frontend, etcd, peer, nats = free_ports(4)
        self.config: dict[str, Any] = {
            "engine": {"max_model_len": 1024, "kv_cache_tokens": 8192, "num_threads": 1},
            "frontend": {"port": frontend},
            "etcd": {"port": etcd, "peer_port": peer, "lease_s": 3},
            "nats": {"port": nats},
        }
        if model is not None:
            self.config["model"] = {"id": model, "name": "tiny"}
        for name, section in sections.items():
            self.config.setdefault(name, {}).update(section)
        self.url = f"http://127.0.0.1:{frontend}"
        self.headers: dict[str, str] = {}  # what the API wants to see

    def snakemake(
        self, *args: str, check: bool = True, timeout_s: float = SNAKEMAKE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `snakemake ARGS` here; stdout and stderr together in `.stdout`."""
        self._share_etcd()
        config = self.directory / "config.yaml"
        config.write_text(yaml.safe_dump(self.config))
        command = [*self.prefix, sys.executable, "-m", "snakemake", *args, "--cores", "all"]
        command += ["--snakefile", str(REPO / "Snakefile"), "--directory", str(self.directory)]
        command += ["--configfile", str(config)]
        done = subprocess.run(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env={**os.environ, "NO_COLOR": "1", **self.environment},
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"snakemake {' '.join(args)} failed:\n{done.stdout}\n{self.logs()}"
            )
        return done

    def _share_etcd(self) -> None:
        """Put etcd where `fetch_binaries` would cache it: a namespace has no way to fetch it."""
        cached = self.directory / "results" / "bin" / "cache" / "etcd"
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(etcd_executable(), cached)

    def logs(self) -> str:
        """The last lines of every log, for a failure report."""
        parts = []
        for log in sorted((self.directory / "logs").rglob("*.log")):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            parts.append(f"--- {log.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    # --- what runs -----------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Program name to pid, as the markers record them."""
        found = {}
        for marker in sorted((self.directory / "run").glob("*.up")):
            with contextlib.suppress(FileNotFoundError):  # its program has ended just now
                found[marker.stem] = json.loads(marker.read_text())["pid"]
        return found

    def processes(self) -> list[psutil.Process]:
        """Every live process of this deployment, whoever its parent is."""
        mine = str((self.directory / "run").resolve())
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SERVING_DEPLOYMENT") == mine:
                    found.append(process)
        return found

    def ports(self) -> list[int]:
        config = self.config
        return [
            config["frontend"]["port"],
            config["etcd"]["port"],
            config["etcd"]["peer_port"],
            config["nats"]["port"],
        ]

    # --- the API -------------------------------------------------------------------------------

    def ready(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/ready", headers=self.headers, timeout=5).json()

    def wait(self, condition: str, check: Any, deadline_s: float = 20) -> Any:
        """Poll `check(ready())` until it is true."""
        ends = time.monotonic() + deadline_s
        last: Any = None
        while time.monotonic() < ends:
            with contextlib.suppress(httpx.HTTPError):
                last = self.ready()
                if check(last):
                    return last
            time.sleep(0.1)
        raise AssertionError(f"not within {deadline_s} s: {condition}; last: {last}\n{self.logs()}")

    def complete(self, prompt: Any, *, max_tokens: int = 16, **more: Any) -> dict[str, Any]:
        """A greedy, non-streamed completion."""
        body = {
            "model": self.config.get("model", {}).get("name", DEFAULT_MODEL),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            **more,
        }
        response = httpx.post(
            f"{self.url}/v1/completions", json=body, headers=self.headers, timeout=120
        )
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self) -> None:
        """`snakemake stop`, then proof that nothing is left."""
        done = self.snakemake("stop", check=False)
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        assert done.returncode == 0, done.stdout
        assert not left, [(p.pid, p.name()) for p in left]
        for port in self.ports():
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still answers"


DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@contextlib.contextmanager
def running(deployment: Deployment, target: str) -> Iterator[Deployment]:
    """Start `target`; stop it and check for leaks afterwards."""
    shm_before = shared_memory()
    try:
        deployment.snakemake(target)
        yield deployment
    finally:
        deployment.stop()
    left = shared_memory() - shm_before
    assert not left, f"shared memory left behind: {left}"


def shared_memory() -> set[str]:
    """Segments of the kinds that UCX, torch and Python make; others are not ours to judge."""
    kinds = ("ucx", "torch", "psm", "sem.", "cuda")
    return {name for name in os.listdir("/dev/shm") if name.startswith(kinds)}


def share_results(source: Path, target: Path) -> None:
    """Give another deployment what was already built, as hard links."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
