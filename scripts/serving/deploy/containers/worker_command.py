"""What a contained program sees of this machine, and how it is started and removed.

Read-only: this project's code, the models, the engine with everything its links point to, and
`container.mounts`. Writable: `run/` of the deployment (sockets, ready files) and a cache folder.
Paths are the same inside and outside. `run_command` writes the command lines themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from serving.config import ContainerConfig
from serving.config.process import WorkerSettings
from serving.deploy.containers.image_store import local_name
from serving.deploy.containers.run_command import (
    ContainedProgram,
    Mount,
    client_command,
    client_environment,
    container_name,
    removal_command,
)
from serving.deploy.planning.source_digest import SCRIPTS
from serving.deploy.processes import tags
from serving.deploy.processes.launchers import RUN

CACHE = Path("results/cache")
"""Home folder inside. Libraries compile and tune into it, and the next start finds the results."""
MODELS = Path("results/models")
_INFINIBAND = Path("/dev/infiniband")
_TAGS = (
    *(tags.DEPLOYMENT, tags.PROGRAM, tags.FINGERPRINT),
    *(tags.ENGINE, tags.LAUNCH),
)
_FORWARDED = ("UCX_", "NCCL_", "NIXL_", "TRTLLM_", "TLLM_", "MOONCAKE_")
"""Settings of libraries, taken from the environment of the workflow."""


class Contained(Struct, frozen=True, kw_only=True):
    """How to start it. `env` adds to the client's environment; `removal` removes a lost container."""

    command: list[str]
    env: dict[str, str]
    removal: list[str]


def contain_worker(
    container: ContainerConfig, program: str, process: WorkerSettings, env: Mapping[str, str]
) -> Contained:
    """How worker `program` starts inside. `env` is the environment it would have outside.

    Raises ConfigError for what the runtime cannot do.
    """
    return contain(
        container,
        [container.python, "-m", "serving.worker", f"run/{program}.json"],
        name=program,
        env=env,
        read_only=[Path(process.engine_dir), MODELS],
        writable=[RUN],
    )


def contain(
    container: ContainerConfig,
    argv: Sequence[str],
    *,
    name: str,
    env: Mapping[str, str],
    read_only: Iterable[Path] = (),
    writable: Iterable[Path] = (),
) -> Contained:
    """`argv` inside, in the working directory. The GPUs are those of `CUDA_VISIBLE_DEVICES` in `env`.

    Folders that do not exist are left out of `read_only`, and made for `writable`.
    """
    container = replace(container, image=local_name(container))
    visible = [folder.absolute() for folder in read_only if folder.exists()]
    linked = {target for folder in visible for target in link_targets(folder)}
    mounts = dict.fromkeys([SCRIPTS, *visible], False)
    mounts |= {t: False for t in linked if not any(t.is_relative_to(folder) for folder in mounts)}
    for folder in (*writable, CACHE):
        folder.mkdir(parents=True, exist_ok=True)
        mounts[folder.absolute()] = True
    bound = {str(path): Mount(str(path), str(path), written) for path, written in mounts.items()}
    for source, target in container.mounts.items():
        bound[target] = Mount(str(Path(source).expanduser().absolute()), target)
    env = {
        **{key: value for key, value in os.environ.items() if key.startswith(_FORWARDED)},
        **env,
        # Packages that this user installed outside must not shadow the image's.
        "PYTHONNOUSERSITE": "1",
        # Runtimes number GPUs as nvidia-smi does; CUDA's own default puts the fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    inside = ContainedProgram(
        argv=argv,
        name=container_name(str(RUN.resolve()), name),
        directory=str(Path.cwd()),
        # A folder comes before the folders that are mounted into it.
        mounts=[bound[target] for target in sorted(bound)],
        env=sorted({*env, *_TAGS}),
        user=(os.getuid(), os.getgid()),
        home=str(CACHE.absolute()),
        gpus=[int(gpu) for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu],
        devices=[str(_INFINIBAND)] if _INFINIBAND.exists() else [],
    )
    return Contained(
        command=client_command(container, inside),
        env=client_environment(container, env, inside),
        removal=removal_command(container, inside.name),
    )


def link_targets(folder: Path, seen: frozenset[Path] = frozenset()) -> set[Path]:
    """Files and folders outside `folder` that its symbolic links point to.

    A container follows a link by its text, so the target must exist inside under the same path.
    Mounting a target resolves further links, except for those within a folder.
    """
    found: set[Path] = set()
    seen |= {folder}
    paths = [
        Path(root, name) for root, folders, files in os.walk(folder) for name in folders + files
    ]
    for path in paths:
        if not path.is_symlink():
            continue
        target = Path(os.path.normpath(path.parent / os.readlink(path)))
        if not target.exists() or any(target.is_relative_to(known) for known in seen):
            continue
        found.add(target)
        if target.is_dir():
            found |= link_targets(target, seen)
    return found
