"""The `workers` section."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from serving.config.base import Count, Positive, Section
from serving.config.engine import EngineConfig
from serving.errors import ConfigError
from serving.protocol import Role


class WorkersConfig(Section, frozen=True):
    """How many workers of each role. `agg` counts for the agg topologies, `prefill` and `decode` for the disagg ones."""

    agg: Annotated[Positive, Meta(description="Workers that prefill and decode.")] = 1
    prefill: Annotated[Positive, Meta(description="Prefill workers.")] = 1
    decode: Annotated[Positive, Meta(description="Decode workers.")] = 1
    gpus: Annotated[
        list[Count] | None,
        Meta(description="Indices of the GPUs that workers get, in order. Default: all GPUs."),
    ] = None
    tensor_parallel: Annotated[
        dict[Role, Positive],
        Meta(description="GPUs that share each layer, per role: `{prefill: 2, decode: 4}`."),
    ] = {}
    pipeline_parallel: Annotated[
        dict[Role, Positive],
        Meta(description="Groups of layers, each on its own GPUs, per role."),
    ] = {}
    instances_per_process: Annotated[
        Annotated[int, Meta(ge=1, le=1024)],
        Meta(
            description="Instances in each worker's process (mock engine). Each instance registers, serves and reports on its own; the first has the worker's name."
        ),
    ] = 1


def check_workers(workers: WorkersConfig, engine: EngineConfig) -> None:
    """Raises ConfigError for parallelism or shared processes that the engine does not have."""
    backend = engine.backend
    sizes = [*workers.tensor_parallel.values(), *workers.pipeline_parallel.values()]
    if backend != "tensorrt_llm" and any(size > 1 for size in sizes):
        num_gpus = "one GPU" if backend == "torch" else "no GPU"
        raise ConfigError(
            "workers.tensor_parallel",
            f"each worker of the {backend} engine uses {num_gpus}",
            remedy="remove it, or set `engine.backend: tensorrt_llm`",
        )
    if workers.instances_per_process > 1 and backend != "mock":
        raise ConfigError(
            "workers.instances_per_process",
            "only mock workers can share a process",
            remedy="remove it, or set `engine.backend: mock`",
        )
