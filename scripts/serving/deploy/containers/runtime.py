"""Run a container runtime's commands, and explain its error messages.

The same command fails in several ways that need different remedies. So the runtime's message is
quoted, and looked up in a table of known messages.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.deploy.checks.findings import Finding
from serving.progress import Report

ASK_S = 30.0
_QUOTED = 600  # characters

INSTALL = {
    "docker": "install Docker Engine, or choose another container.runtime",
    "podman": "`apt-get install podman runc`, or choose another container.runtime",
    "apptainer": "install Apptainer, or choose another container.runtime",
    "enroot": "install enroot, or choose another container.runtime",
}
# The first complaint that is found decides, so the particular ones come first.
REMEDIES = {
    "cannot connect to the docker daemon": "start it (`systemctl start docker`), or set DOCKER_HOST",
    "unknown server os": "start the Docker daemon (`systemctl start docker`), or set DOCKER_HOST",
    "permission denied while trying to connect": "join the docker group (`usermod -aG docker $USER`) "
    "and log in again, or set container.runtime to podman",
    "rlimit": "this machine may not raise limits that far: set container.ulimits to what it has "
    "(`ulimit -Hn`, `-Hu`, `-Hl`), as {nofile: '1024:1024', nproc: '4096:4096'}",
    "cgroups in hybrid mode": "let podman use runc: a containers.conf whose [engine] section says "
    'runtime = "runc"; name it in CONTAINERS_CONF',
    "newuidmap": "rootless podman needs the package uidmap and a line for you in /etc/subuid",
    "user namespace": "let users make namespaces: `sysctl kernel.unprivileged_userns_clone=1`",
    "unsatisfied condition: cuda": "update the NVIDIA driver, or choose an image of an older CUDA "
    "with container.base_tag",
    "could not select device driver": "install nvidia-container-toolkit and restart Docker",
    "nvidia.com/gpu": "let the toolkit describe the GPUs to podman: `nvidia-ctk cdi generate "
    "--output=/etc/cdi/nvidia.yaml`",
    "nvidia-container-cli": "install libnvidia-container-tools, and check that nvidia-smi works here",
    "no space left on device": "free disk space where the runtime keeps its images, or move that "
    "folder; TensorRT-LLM's image takes about 40 GB unpacked",
    "toomanyrequests": "the registry limits anonymous pulls: log in, or wait",
    "unauthorized": "log in: `{runtime} login {registry}` (nvcr.io: user `$oauthtoken`, password an "
    "NGC API key)",
    "authentication required": "log in: `{runtime} login {registry}` (nvcr.io: user `$oauthtoken`, "
    "password an NGC API key)",
    "access to the resource is denied": "check the image's name, and that your account may see it: "
    "`{runtime} login {registry}`",
    "403 forbidden": "your account may not fetch this image: check its name, and `{runtime} login {registry}`",
    "x509": "the registry's certificate is not trusted here: install your company's CA for {runtime}",
    "manifest unknown": "there is no such tag: correct container.image or container.base_tag",
    "manifest for": "there is no such tag: correct container.image or container.base_tag",
    "short-name": "begin the image's name with its registry, as docker.io/library/debian:12",
    "unqualified-search": "begin the image's name with its registry, as docker.io/library/debian:12",
    **dict.fromkeys(
        ("no such host", "i/o timeout", "connection refused", "network is unreachable"),
        "this machine cannot reach {registry}: set HTTPS_PROXY for {runtime}, or bring the image "
        "over: `{runtime} save` where there is a network, `{runtime} load` here",
    ),
    "temporary failure in name resolution": "this machine cannot reach {registry}: set HTTPS_PROXY, "
    "or bring the image over as a file",
    **dict.fromkeys(
        ("executable file not found", "a command that was not found", "not found in $path"),
        "name the image's Python in container.python, or use an image that has one",
    ),
}


def ask(name: str, command: Sequence[str], timeout_s: float = ASK_S, image: str = "") -> Finding:
    """A finding with the first line of the answer, or with the complaint and its remedy."""
    code, text = run(command, timeout_s)
    if code == 0:
        return Finding(name, True, text.splitlines()[0].strip() if text else "works")
    return complaint(name, command, code, text, image)


def complaint(name: str, command: Sequence[str], code: int, text: str, image: str = "") -> Finding:
    """The finding for a command that failed with `code` and printed `text`."""
    runtime = Path(command[0]).name
    quote = f"{runtime} says: {text or f'exit {code}'}"
    by_hand = f"try it by hand: `{' '.join(command)}`"
    remedy = next((r for word, r in REMEDIES.items() if word in text.lower()), "")
    filled = remedy.replace("{runtime}", runtime).replace("{registry}", registry(image))
    return Finding(name, False, quote, filled or by_hand)


def registry(image: str) -> str:
    """Where a reference is fetched from; docker.io when it names no host."""
    first, slash, _ = image.removeprefix("docker://").partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return first if named else "docker.io"


def run(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and text: the error message when it failed, else its output.

    `env` adds to this process's environment.
    """
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
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
    return done.returncode, quoted(done.stderr.strip() or done.stdout)


def stream(command: Sequence[str], report: Report) -> tuple[int, str]:
    """Run a long command and report each of its lines. Returns its exit code and last lines.

    There is no deadline: a slow registry is not a failure, and the person sees the progress.
    """
    last: list[str] = []
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as exc:
        return 126, str(exc)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.strip():
                report(text)
                last = [*last[-20:], text]
    return process.returncode, quoted(" ".join(last))


def quoted(text: str) -> str:
    """The end of the text on one line: a runtime names the error last."""
    return " ".join(text.split())[-_QUOTED:]
