"""The target of an engine: library version, GPUs, driver, and the parallelism of each role.

An engine for one target is wrong on another. `stamp` goes into its manifest, so that the worker
that loads it can compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from serving.config import Config
from serving.engine.manifest import Flow
from serving.engine.trtllm.versions import LAST_WITH_TENSORRT, Version
from serving.errors import ConfigError
from serving.gpus import Gpu
from serving.protocol import Role


class Parallelism(Struct, frozen=True, order=True):
    """`tensor` GPUs share each layer; `pipeline` groups of layers follow each other."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.pipeline}"


class Host(Struct, frozen=True, kw_only=True):
    """The machine an engine is made on and for. `driver` is its version, empty when unknown."""

    gpus: Sequence[Gpu] = ()
    driver: str = ""

    @property
    def capabilities(self) -> list[int]:
        """Distinct known ones, sorted."""
        return sorted({gpu.capability for gpu in self.gpus if gpu.capability})

    @property
    def memory_bytes(self) -> int:
        """Of the smallest GPU whose memory is known, else 0: any worker may get that one."""
        return min((gpu.memory_bytes for gpu in self.gpus if gpu.memory_bytes), default=0)


def parallelism(config: Config, roles: Sequence[Role]) -> dict[Role, Parallelism]:
    tensor, pipeline = config.workers.tensor_parallel, config.workers.pipeline_parallel
    return {role: Parallelism(tensor.get(role, 1), pipeline.get(role, 1)) for role in roles}


def resolve_flow(config: Config, version: Version) -> Flow:
    """`auto` is `pytorch`. Raises ConfigError for `trtllm-build` with a version that has none."""
    if config.engine.flow != "trtllm-build":
        return "pytorch"
    if version.line > LAST_WITH_TENSORRT:
        last = ".".join(map(str, LAST_WITH_TENSORRT))
        raise ConfigError(
            "engine.flow",
            f"TensorRT-LLM {version} has no trtllm-build: the TensorRT backend was removed after "
            f"{last}, and models run from their checkpoint",
            remedy=f"remove `engine.flow` (`auto` means `pytorch`), or install TensorRT-LLM {last}",
        )
    return "trtllm-build"


def stamp(version: Version, cuda: str, host: Host) -> dict[str, str]:
    """For `EngineManifest.stamp`; unknown entries are left out."""
    known: Mapping[str, str] = {
        "tensorrt_llm": version.text,
        "gpus": ", ".join(sorted({gpu.name for gpu in host.gpus})),
        "compute_capability": ", ".join(f"{sm // 10}.{sm % 10}" for sm in host.capabilities),
        "driver": host.driver,
        "cuda": cuda,
    }
    return {name: value for name, value in known.items() if value}
