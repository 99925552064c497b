"""What `auto` means for `engine.device` and `engine.dtype` on a machine."""

from __future__ import annotations

from serving.config import Config
from serving.config.resolve import Device, Dtype
from serving.deploy.planning.machine import Machine, this_machine
from serving.errors import ConfigError


def resolve_device(config: Config, machine: Machine | None = None) -> Device:
    """`auto` is CUDA when the driver shows a GPU and torch was not installed for CPU only.

    TensorRT-LLM runs only on CUDA; with `cpu` it gets no GPUs, for tests with a stand-in of the
    library. The mock engine never needs a GPU.
    """
    if config.engine.device != "auto":
        return config.engine.device
    if config.engine.backend == "tensorrt_llm":
        return "cuda"
    if config.engine.backend == "mock":
        return "cpu"
    machine = machine or this_machine()
    return "cuda" if machine.has_gpu and "+cpu" not in machine.versions["torch"] else "cpu"


def resolve_dtype(config: Config, machine: Machine | None = None) -> Dtype:
    """`auto` is float32 on CPU (exactly the source's weights) and bfloat16 on CUDA.

    Raises ConfigError for int8 where `engine.device: auto` means CUDA.
    """
    device = resolve_device(config, machine)
    if config.engine.dtype == "int8" and device == "cuda":
        raise ConfigError(
            "engine.dtype",
            "int8 is for CPUs, and this machine has a GPU that would be used",
            remedy="set it to auto, or `engine.device: cpu`",
        )
    if config.engine.dtype != "auto":
        return config.engine.dtype
    return "bfloat16" if device == "cuda" else "float32"
