"""The sections about how programs run: `deployment` as a whole, and `container` for workers."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Positive, Seconds, Section
from serving.protocol import Role

Topology = Literal["agg", "agg_router", "disagg", "disagg_router", "disagg_multinode"]
MULTINODE: Topology = "disagg_multinode"
Restart = Literal["on_failure", "never"]


class DeploymentConfig(Section, frozen=True):
    """The deployment as a whole."""

    topology: Annotated[
        Topology,
        Meta(description="What a bare `snakemake` serves. A `serve_*` target overrides it."),
    ] = "disagg_router"
    namespace: Annotated[
        Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)],
        Meta(description="Prefix of all etcd keys and NATS subjects."),
    ] = "serving"
    start_s: Annotated[Seconds, Meta(description="Deadline for one program to become ready.")] = (
        180.0
    )
    stop_s: Annotated[
        Seconds, Meta(description="Time that a program gets to drain before it is killed.")
    ] = 20.0
    restart: Annotated[
        Restart,
        Meta(
            description="`on_failure`: a program that ends by itself, or is silent for `silent_s`, is replaced. `never`: the next serve target replaces it."
        ),
    ] = "on_failure"
    max_restarts: Annotated[
        Positive,
        Meta(
            description="A program that has been replaced this often within `restart_window_s` and fails again stays down. `snakemake status` says why."
        ),
    ] = 5
    restart_window_s: Annotated[
        Seconds, Meta(description="Time over which `max_restarts` counts.")
    ] = 180.0
    silent_s: Annotated[
        Seconds,
        Meta(
            description="A program that gives no sign of life for this time is killed and replaced. For workers and frontends, the event loop gives it."
        ),
    ] = 10.0
    hang_s: Annotated[
        Seconds,
        Meta(
            description="A worker ends, and is replaced, when a step of its engine takes this much longer than the slowest steps so far let expect. Much earlier, requests go elsewhere."
        ),
    ] = 30.0


class ContainerConfig(Section, frozen=True):
    """Run workers in a container. `check_container` tests the settings before a start."""

    runtime: Annotated[
        Literal["none", "docker", "podman", "apptainer", "enroot"],
        Meta(description="Container runtime."),
    ] = "none"
    roles: Annotated[
        list[Role] | None,
        Meta(description="Containerise only workers of these roles. Default: all workers."),
    ] = None
    image: Annotated[
        str | None,
        Meta(
            description="Image of the workers: a reference, or a file (apptainer, enroot). Default: the image that `build_image` made."
        ),
    ] = None
    python: Annotated[str, Meta(description="Python interpreter inside the image.")] = "python3"
    pull: Annotated[
        bool, Meta(description="Fetch a missing image. Off: the image must be there already.")
    ] = False
    base_image: Annotated[
        str | None,
        Meta(description="Image that `build_image` starts from, instead of building a base image."),
    ] = None
    base_tag: Annotated[
        str,
        Meta(
            description="Tag of `base_image`, or of TensorRT-LLM's release image; with `source_commit`, of its devel image."
        ),
    ] = "1.2.0"
    source_commit: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-f]{40}$")] | None,
        Meta(
            description="Build TensorRT-LLM itself from this commit, inside its devel image and for that image's ABI."
        ),
    ] = None
    cuda_architectures: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-z;-]+$")] | None,
        Meta(
            description="With `source_commit`: build only for these, such as `90-real;100-real`. Default: all, which takes hours."
        ),
    ] = None
    shm_bytes: Annotated[
        Positive | None, Meta(description="Shared memory. Default: as much as the host has.")
    ] = None
    ulimits: Annotated[
        dict[str, int | str] | None,
        Meta(
            description="Limits inside the container (docker, podman), in the format of `--ulimit`. Default: the ones TensorRT-LLM recommends, `{memlock: -1, stack: 67108864}`."
        ),
    ] = None
    extra_flags: Annotated[
        list[str], Meta(description="Additional flags of the runtime's run command.")
    ] = []
    mounts: Annotated[
        dict[str, str],
        Meta(description="Additional folders, host path to container path, read-only."),
    ] = {}
