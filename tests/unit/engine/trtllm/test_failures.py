"""What TensorRT-LLM raises at start, as one paragraph with a remedy."""

import pytest
from serving.engine.trtllm.failures import explain_start, missing_library
from serving.errors import OperatorError


def paragraph(error: OperatorError) -> str:
    assert error.what
    assert error.remedy
    return f"{error.what}\n{error.remedy}"


@pytest.mark.parametrize(
    ("raised", "means", "change"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "memory",
            "tensorrt_llm.free_gpu_memory_fraction",
        ),
        (
            RuntimeError("[TensorRT-LLM][ERROR] cudaErrorMemoryAllocation"),
            "memory",
            "engine.max_batch_size",
        ),
        (RuntimeError("No CUDA GPUs are available"), "no NVIDIA GPU", "nvidia-smi"),
        (
            RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
            "driver is too old",
            "container.base_tag",
        ),
        (
            RuntimeError("Only 2 GPUs are available, but 4 are required."),
            "among 4 GPUs, and 2",
            "workers.tensor_parallel",
        ),
        (
            RuntimeError("Serialization assertion plan->header.pad == expectedPlatformTag failed"),
            "another one",
            "rebuilds",
        ),
        (
            RuntimeError("no kernel image is available for execution on the device"),
            "another one",
            "rebuilds",
        ),
        (
            ValueError("TP size 2 does not match the engine's mapping: tp_size mismatch 2 != 1"),
            "another number of GPUs",
            "workers.tensor_parallel",
        ),
        (RuntimeError("MPI_Comm_spawn failed: not enough slots"), "MPI", "Slurm"),
        (
            ValueError("1 validation error for TorchLlmArgs\nfoo\n Extra inputs are not permitted"),
            "refuses one of its arguments",
            "tensorrt_llm.llm_args",
        ),
        (KeyError("something else"), "something else", "log"),
    ],
)
def test_each_failure_is_explained_with_a_remedy(
    raised: Exception, means: str, change: str
) -> None:
    error = explain_start(raised)
    text = paragraph(error)
    assert means in error.what
    assert change in error.remedy
    assert type(raised).__name__ in text


def test_long_messages_are_cut_to_their_first_line() -> None:
    error = explain_start(RuntimeError("first\n" + "trace\n" * 500))
    assert "first" in error.what
    assert "trace" not in error.what


def test_cause_behind_the_executors_error_counts() -> None:
    hidden = RuntimeError("Executor worker returned error")
    hidden.__cause__ = RuntimeError("CUDA out of memory")
    error = explain_start(hidden)
    assert "(RuntimeError: CUDA out of memory)" in error.what


def test_missing_package_and_missing_driver_are_different_errors() -> None:
    missing = missing_library(ModuleNotFoundError("No module named x", name="tensorrt_llm"))
    assert "not installed" in missing.what
    assert "container.runtime" in missing.remedy
    broken = missing_library(ImportError("libcuda.so.1: cannot open shared object file"))
    assert "no NVIDIA GPU" in broken.what
