"""podman for tests: containers of this machine's own Python, and what runs in them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from integration.deployment import Deployment
from missing_tools import PODMAN, skip_without
from serving.deploy.containers.run_command import container_name

TAG = os.getpid()  # another run of these tests shares the store, and removes its images by force
IMAGE = f"localhost/serving-test:{TAG}"
SYSTEM = ("/lib", "/lib64", "/usr")


def podman(*arguments: str, check: bool = True, data: bytes | None = None) -> str:
    done = subprocess.run(["podman", *arguments], input=data, capture_output=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def python_mounts() -> dict[str, str]:
    """This interpreter and what it is linked with, instead of a gigabyte in an image."""
    folders = [sys.prefix, sys.base_prefix, *(folder for folder in SYSTEM if Path(folder).exists())]
    return {folder: folder for folder in dict.fromkeys(folders)}


def limits() -> dict[str, str]:
    """Below what this machine has: podman's own defaults take a capability that it may lack."""
    return {"nofile": "4096:4096", "nproc": "4096:4096"}


def empty_root() -> bytes:
    """A root filesystem with the folders that programs expect, and nothing in them."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("etc", "tmp", "root", "bin"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
    return archive.getvalue()


@contextmanager
def usable_podman(folder: Path) -> Iterator[None]:
    """podman with `IMAGE` in its store. Skips the test if podman cannot run containers here."""
    skip_without(PODMAN)
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("runc"):
            conf = folder / "containers.conf"
            conf.write_text('[engine]\nruntime = "runc"\n')  # crun refuses hybrid cgroups
            patch.setenv("CONTAINERS_CONF", str(conf))
        made = subprocess.run(
            ["podman", "import", "-", IMAGE], input=empty_root(), capture_output=True, check=False
        )
        if made.returncode != 0:
            pytest.skip(f"podman says: {made.stderr.decode().strip()}")
        flags = [f"--ulimit={name}={value}" for name, value in limits().items()]
        flags += [f"--mount=type=bind,src={m},dst={m},ro" for m in python_mounts()]
        command = ["podman", "run", "--rm", "--network=host", *flags, IMAGE, sys.executable]
        tried = subprocess.run([*command, "-c", "pass"], capture_output=True, check=False)
        if tried.returncode != 0:
            podman("rmi", "--force", IMAGE, check=False)
            pytest.skip(f"podman says: {tried.stderr.decode().strip()}")
        yield
        podman("rmi", "--force", IMAGE, check=False)


def containers(directory: Path) -> list[str]:
    """Programs of the deployment in `directory` that have a container, running or not."""
    prefix = container_name(str((directory / "run").resolve()), "")
    names = podman("ps", "--all", "--format", "{{.Names}}").split()
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def worker_inside(deployment: Deployment, program: str) -> psutil.Process:
    """The worker itself, and not the client that started it."""
    [found] = [
        process
        for process in deployment.processes()
        if process.environ().get("SERVING_PROGRAM") == program
        and "run/" in process.cmdline()[-1]
        and "podman" not in process.name()
    ]
    return found


def root_of(process: psutil.Process) -> tuple[int, int]:
    stat = os.stat(f"/proc/{process.pid}/root/")
    return stat.st_dev, stat.st_ino
