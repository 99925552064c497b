"""Can the configured container runtime start the configured image?

The runtime is asked for its version, for the image, and finally to run the image once. What
it answers is quoted, since the same command fails in several ways that need different remedies.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from serving.config import ContainerConfig
from serving.deploy.checks import Finding

ASK_S = 30.0
RUN_S = 120.0

_USABLE = {
    "docker": ["info"],
    "podman": ["info"],
    "apptainer": ["version"],
    "enroot": ["version"],
}
_REMEDIES = {
    "Cannot connect to the Docker daemon": "start it (`systemctl start docker`), or set DOCKER_HOST",
    "permission denied while trying to connect": "join the docker group (`usermod -aG docker $USER`) "
    "and log in again, or set container.runtime to podman",
    "setrlimit": "point CONTAINERS_CONF at a containers.conf whose [containers] section says "
    'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]',
    "cgroups in hybrid mode": "let podman use runc: a containers.conf whose [engine] section says "
    'runtime = "runc"',
    "newuidmap": "rootless podman needs the package uidmap and a line for you in /etc/subuid",
    "executable file not found": "the image lacks /bin/true: use one with a base system in it",
    "could not select device driver": "install nvidia-container-toolkit",
}
_INSTALL = {
    "docker": "install Docker Engine, or choose another container.runtime",
    "podman": "`apt-get install podman runc`, or choose another container.runtime",
    "apptainer": "install Apptainer, or choose another container.runtime",
    "enroot": "install enroot, or choose another container.runtime",
}


def check_container(config: ContainerConfig) -> list[Finding]:
    """All findings about `container.*`; a single one when no container is configured."""
    runtime = config.runtime
    if runtime == "none":
        return [Finding("container", True, "not needed: container.runtime is none")]
    program = shutil.which(runtime)
    if program is None:
        return [Finding("runtime", False, f"{runtime} is not on PATH", _INSTALL[runtime])]
    usable = _ask("runtime", [program, *_USABLE[runtime]], ASK_S)
    if not usable.ok:
        return [usable]
    if not config.image:
        return [
            usable,
            Finding("image", False, "container.image is not set", "name the image to run"),
        ]
    present = _image(program, runtime, config.image)
    if not present.ok:
        return [usable, present]
    return [usable, present, _ask("run", _trial(program, runtime, config.image), RUN_S)]


def _image(program: str, runtime: str, image: str) -> Finding:
    """Is the image on this machine? A start must not hang in a download."""
    if runtime in ("docker", "podman"):
        finding = _ask("image", [program, "image", "inspect", "--format", "{{.Id}}", image], ASK_S)
        remedy = f"`{runtime} pull {image}`, or name another image in container.image"
        return finding if finding.ok else Finding("image", False, finding.detail, remedy)
    if Path(image).exists():
        return Finding("image", True, image)
    if runtime == "enroot":
        names = _run([program, "list"], ASK_S)[1].split()
        if image in names:
            return Finding("image", True, image)
        return _absent(f"enroot import -o image.sqsh docker://{image}", f"no container {image}")
    return _absent(f"apptainer pull image.sif docker://{image}", f"no file {image}")


def _absent(command: str, quoted: str) -> Finding:
    return Finding(
        "image", False, quoted, f"`{command}`, then name in container.image what it made"
    )


def _trial(program: str, runtime: str, image: str) -> list[str]:
    if runtime in ("docker", "podman"):
        return [program, "run", "--rm", "--network", "host", "--entrypoint", "/bin/true", image]
    if runtime == "apptainer":
        return [program, "exec", image, "/bin/true"]
    return [program, "start", image, "/bin/true"]


def _ask(name: str, command: list[str], timeout_s: float) -> Finding:
    """Run a command of the runtime; on failure quote it and look its complaint up."""
    code, text = _run(command, timeout_s)
    if code == 0:
        first = text.splitlines()[0].strip() if text else "works"
        return Finding(name, True, first)
    remedy = next(
        (remedy for complaint, remedy in _REMEDIES.items() if complaint.lower() in text.lower()),
        f"try it by hand: `{' '.join(command)}`",
    )
    return Finding(name, False, f"{Path(command[0]).name} says: {text or f'exit {code}'}", remedy)


def _run(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and what it said: the complaint when it failed, else its output."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:g} s"
    except OSError as exc:
        return 126, str(exc)
    if done.returncode == 0:
        return 0, done.stdout.strip()
    complaint = done.stderr.strip() or done.stdout.strip()
    return done.returncode, " ".join(complaint.split())[-600:]
