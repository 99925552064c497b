"""Why TensorRT-LLM did not start, for the person who starts it.

Its errors come from many libraries and carry no types that could be relied on, so the text decides.
"""

from __future__ import annotations

import re

from serving.errors import OperatorError

LESS_MEMORY = (
    "lower `engine.max_batch_size` or `engine.max_num_batched_tokens`, then "
    "`tensorrt_llm.free_gpu_memory_fraction`; or share the weights among more GPUs with "
    "`workers.tensor_parallel`"
)

_TOO_FEW = re.compile(r"only (\d+) gpus? (?:is|are) available, but (\d+)", re.IGNORECASE)

# (what to find, what it means, what to change); the first that is found counts.
_KNOWN: list[tuple[re.Pattern[str], str, str]] = [
    (
        re.compile(r"out of memory|OutOfMemory|cudaErrorMemoryAllocation", re.IGNORECASE),
        "the GPU's memory does not hold the weights, the KV blocks and one batch",
        LESS_MEMORY,
    ),
    (
        re.compile(
            r"driver version is insufficient|driver on your system is too old|"
            r"unsupported (?:display )?driver|cudaErrorInsufficientDriver",
            re.IGNORECASE,
        ),
        "the NVIDIA driver is too old for the CUDA that it was built with",
        "update the driver, or set `container.base_tag` to an image for this driver",
    ),
    (
        re.compile(
            r"no cuda gpus|no cuda-capable device|no nvidia driver|libcuda\.so|libnvidia-ml|"
            r"cudaErrorNoDevice|torch not compiled with cuda",
            re.IGNORECASE,
        ),
        "it sees no NVIDIA GPU",
        "start it where `nvidia-smi` lists one, with `container.runtime` set up to pass GPUs on; "
        "or set `engine.backend: torch`, which runs on the CPU",
    ),
    (
        re.compile(
            r"no kernel image|serialization.*(?:version|platform)|deserializ|"
            r"compiled for|(?:sm|compute capability).*(?:mismatch|not supported)",
            re.IGNORECASE,
        ),
        "the engine does not suit this GPU: it was built for another one, or by another version",
        "run the serve target again on this machine: it rebuilds the engine",
    ),
    (
        re.compile(r"(?:tp|pp|world).{0,8}size.*(?:mismatch|does not match|!=)", re.IGNORECASE),
        "the engine was built for another number of GPUs",
        "run the serve target again: it rebuilds the engine for `workers.tensor_parallel`",
    ),
    (
        re.compile(r"mpi_comm_spawn|mpi_init|pmix|not enough slots", re.IGNORECASE),
        "its processes could not be started over MPI",
        "start outside of a Slurm or MPI job step, or let TensorRT-LLM's image bring its own MPI: "
        "`container.runtime`",
    ),
    (
        re.compile(r"extra inputs are not permitted|validation errors? for", re.IGNORECASE),
        "this version refuses one of its arguments",
        "see `tensorrt_llm.llm_args` in the config, and llm_args-*.yaml in the engine's folder",
    ),
]


def missing_library(exc: ImportError) -> OperatorError:
    """For an import that failed: the library itself, or one of those it stands on."""
    if exc.name == "tensorrt_llm":
        return OperatorError(
            "`engine.backend: tensorrt_llm` needs the Python package tensorrt_llm, which is not "
            "installed here",
            remedy="set `container.runtime` and `container.image` to run workers in its image, or "
            "start from an environment that has it",
        )
    return explain_start(exc, "imported")


def explain_start(exc: BaseException, what: str = "started") -> OperatorError:
    """The one paragraph for whatever `LLM` raised. `what`: what it could not be."""
    messages = _chain(exc)
    text = "\n".join(messages)
    first_line = messages[-1].strip().splitlines()[0][:300]
    if found := _TOO_FEW.search(text):
        return OperatorError(
            f"TensorRT-LLM could not be {what}: a worker shares its layers among {found[2]} GPUs, "
            f"and {found[1]} are visible to it ({first_line})",
            remedy="lower `workers.tensor_parallel` or `workers.pipeline_parallel`, or give "
            "`workers.gpus` more GPUs",
        )
    for pattern, meaning, remedy in _KNOWN:
        if pattern.search(text):
            return OperatorError(
                f"TensorRT-LLM could not be {what}: {meaning} ({first_line})", remedy=remedy
            )
    return OperatorError(
        f"TensorRT-LLM could not be {what}: {first_line}",
        remedy="read the lines above this one in the worker's log",
    )


def _chain(exc: BaseException) -> list[str]:
    """The message of `exc` and those of its causes: the executor's error hides its worker's."""
    messages = []
    while True:
        messages.append(f"{type(exc).__name__}: {exc}")
        cause = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
        if cause is None:
            break
        exc = cause
    return messages
