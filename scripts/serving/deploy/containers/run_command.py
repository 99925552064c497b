"""The command lines that run a program inside a container, for each runtime. Pure.

Paths inside equal those outside, so a program reads the same settings wherever it runs. A
contained program shares the host's network, IPC and process ids. So workers find each other on
loopback, CUDA IPC and shared memory work between them, their processes are visible from outside,
and signals need no init because none of them is process 1. `worker_command` decides the mounts.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from serving.config import ContainerConfig
from serving.errors import ConfigError
from serving.protocol import Role

ULIMITS: Mapping[str, int | str] = {"memlock": -1, "stack": 67108864}
"""The limits in TensorRT-LLM's documentation: unlimited pinned memory, and a larger stack."""
_DAEMONS = ("docker", "podman")
"""Runtimes whose containers outlive the client that started them."""


class Mount(Struct, frozen=True, order=True):
    """A host path that is visible inside, at `target`. Absolute paths, files or folders."""

    source: str
    target: str
    writable: bool = False


class ContainedProgram(Struct, frozen=True, kw_only=True):
    """What to run inside. `env` are names: their values come from the client's environment.

    `gpus` are host indices, in the order in which the program should count them; `devices` more
    device files or folders. `user` is (uid, gid): what it writes belongs to that user.
    `home` is a writable folder for caches; the client must keep its own HOME.
    """

    argv: Sequence[str]
    name: str
    directory: str
    mounts: Sequence[Mount]
    env: Sequence[str]
    user: tuple[int, int]
    home: str
    gpus: Sequence[int] = ()
    devices: Sequence[str] = ()


def runs_in_container(container: ContainerConfig, role: Role) -> bool:
    """Whether workers of this role run in a container."""
    roles = container.roles
    return container.runtime != "none" and (roles is None or role in roles)


def container_identity(container: ContainerConfig, role: Role) -> list[Any]:
    """The container's part of a worker's fingerprint; empty for a worker outside."""
    if not runs_in_container(container, role):
        return []
    return [
        container.runtime,
        container.image,
        container.python,
        container.shm_bytes,
        dict(ulimits(container)),
        container.extra_flags,
        container.mounts,
    ]


def ulimits(container: ContainerConfig) -> Mapping[str, int | str]:
    return ULIMITS if container.ulimits is None else container.ulimits


def container_name(run_dir: str, program: str) -> str:
    """The same for every start of a program in one deployment, so a stale one can be removed."""
    return f"serving-{hashlib.sha256(run_dir.encode()).hexdigest()[:12]}-{program}"


def client_command(container: ContainerConfig, program: ContainedProgram) -> list[str]:
    """The client's command line. Raises ConfigError for what the runtime cannot do."""
    runtime = container.runtime
    if container.image is None:
        raise ConfigError(
            "container.image",
            "is not set, and no image was built here",
            remedy="name an image, or run `snakemake build_image`",
        )
    if runtime not in _DAEMONS and container.shm_bytes is not None:
        raise ConfigError(
            "container.shm_bytes",
            f"{runtime} always gives the shared memory of the host",
            remedy="remove the key; the size of /dev/shm is the host's to set",
        )
    build = {"docker": _docker, "podman": _podman, "apptainer": _apptainer, "enroot": _enroot}
    return build[runtime](container, container.image, program)


def client_environment(
    container: ContainerConfig, env: Mapping[str, str], program: ContainedProgram
) -> dict[str, str]:
    """`env` for the client. Inside, GPUs are numbered from 0 among those that the program gets."""
    runtime, adapted = container.runtime, dict(env)
    if program.gpus and runtime != "apptainer":
        inside = sorted(program.gpus)
        adapted["CUDA_VISIBLE_DEVICES"] = _comma_separated(
            inside.index(gpu) for gpu in program.gpus
        )
    if runtime == "enroot":
        # Its hooks run outside and decide by these variables which devices they mount.
        adapted["NVIDIA_VISIBLE_DEVICES"] = _comma_separated(sorted(program.gpus)) or "void"
        adapted["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
        adapted["MELLANOX_VISIBLE_DEVICES"] = "all" if program.devices else "void"
    return adapted


def removal_command(container: ContainerConfig, name: str) -> list[str]:
    """Removes a container whose client is gone; empty for runtimes where none can outlive it."""
    if container.runtime == "docker":
        return ["docker", "rm", "--force", name]
    if container.runtime == "podman":
        return ["podman", "rm", "--force", "--time", "0", "--ignore", name]
    return []


def _docker(container: ContainerConfig, image: str, program: ContainedProgram) -> list[str]:
    flags = _common(container, program)
    if program.gpus:
        # Docker splits the value at commas unless the quotes are part of it.
        flags.append(f'--gpus="device={_comma_separated(sorted(program.gpus))}"')
    return ["docker", "run", *flags, *container.extra_flags, image, *program.argv]


def _podman(container: ContainerConfig, image: str, program: ContainedProgram) -> list[str]:
    flags = _common(container, program)
    if program.user[0] != 0:
        flags.append("--userns=keep-id")  # otherwise a user's files have no owner inside
    flags += [f"--device=nvidia.com/gpu={gpu}" for gpu in sorted(program.gpus)]
    return ["podman", "run", *flags, *container.extra_flags, image, *program.argv]


def _common(container: ContainerConfig, program: ContainedProgram) -> list[str]:
    """Flags that docker and podman share."""
    uid, gid = program.user
    shared_memory = ["--ipc=host"]
    if container.shm_bytes is not None:
        shared_memory = ["--ipc=private", f"--shm-size={container.shm_bytes}"]
    return [
        "--rm",
        f"--name={program.name}",
        # A signal to the client is one to the program, and its exit code is the client's.
        "--sig-proxy=true",
        "--network=host",
        "--pid=host",
        *shared_memory,
        *(f"--ulimit={name}={value}" for name, value in ulimits(container).items()),
        f"--user={uid}:{gid}",
        f"--workdir={program.directory}",
        *(f"--device={device}" for device in program.devices),
        *_mounts(program.mounts),
        *(f"--env={setting}" for setting in _settings(program)),
    ]


def _apptainer(container: ContainerConfig, image: str, program: ContainedProgram) -> list[str]:
    """`exec` hands the whole environment on, keeps the user, and shares all namespaces but mounts."""
    flags = ["--nv"] if program.gpus else []
    flags += ["--home", program.home, "--pwd", program.directory, *_mounts(program.mounts)]
    return ["apptainer", "exec", *flags, *container.extra_flags, image, *program.argv]


def _enroot(container: ContainerConfig, image: str, program: ContainedProgram) -> list[str]:
    """`start` becomes the program itself. It starts in the home folder, hence the shell."""
    flags = []
    for mount in program.mounts:
        if any(char in mount.source + mount.target for char in ": \t\n"):
            raise ConfigError(
                "container.runtime",
                f"enroot cannot mount {mount.source}: its path has a colon or a space",
                remedy="move it, or choose another runtime",
            )
        mode = "rw" if mount.writable else "ro"
        flags += ["--mount", f"{mount.source}:{mount.target}:x-create=auto,rbind,{mode}"]
    for setting in _settings(program):
        flags += ["--env", setting]
    there = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', program.directory]
    return ["enroot", "start", *flags, *container.extra_flags, image, *there, *program.argv]


def _settings(program: ContainedProgram) -> list[str]:
    """Names, whose values the client has, and the few values that must differ inside.

    Libraries look up the user's name, and an image has no entry for the uid of its user.
    """
    return [*program.env, f"HOME={program.home}", "USER=serving"]


def _mounts(mounts: Sequence[Mount]) -> list[str]:
    """The form that docker, podman and apptainer share: one CSV record, so that paths may be odd."""
    flags = []
    for mount in mounts:
        fields = ["type=bind", f"src={mount.source}", f"dst={mount.target}"]
        record = io.StringIO()
        csv.writer(record, lineterminator="").writerow(fields + ["ro"] * (not mount.writable))
        flags.append(f"--mount={record.getvalue()}")
    return flags


def _comma_separated(numbers: Any) -> str:
    return ",".join(map(str, numbers))
