"""Which TensorRT-LLM is installed, asked in a process of its own. Nothing here imports it."""

from __future__ import annotations

import json
import subprocess
from typing import Protocol

from msgspec import Struct

from serving.engine.trtllm.versions import Version, parse_version
from serving.errors import OperatorError
from serving.progress import Report

PYTHON = "{python}"
"""In an argv for `RunProgram`: the interpreter that has the library, on the host or in an image."""

_MARK = "SERVING-LIBRARY "
_PROBE = f"""
import json, sys
import tensorrt_llm
torch = sys.modules.get("torch")
cuda = getattr(getattr(torch, "version", None), "cuda", None) or ""
print("{_MARK}" + json.dumps([tensorrt_llm.__version__, cuda]))
"""


class RunProgram(Protocol):
    """Runs a program where the library is, and waits for it.

    Its output, both streams as one text, is in `stdout`; each line also goes to `report` as it
    comes. Raises OperatorError when the program cannot be started at all.
    """

    def __call__(
        self, argv: list[str], *, report: Report | None = None
    ) -> subprocess.CompletedProcess[str]: ...


class InstalledLibrary(Struct, frozen=True):
    """`cuda` is the release its torch was built for, empty when unknown."""

    version: Version
    cuda: str


def probe_library(run: RunProgram) -> InstalledLibrary:
    """Import it in that process. Raises OperatorError: it cannot be imported, or is not supported."""
    done = run([PYTHON, "-c", _PROBE])
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode != 0 or not found:
        raise _not_importable(done.stdout)
    version, cuda = json.loads(found[-1].removeprefix(_MARK))
    return InstalledLibrary(parse_version(version), cuda)


def _not_importable(output: str) -> OperatorError:
    last = ([line.strip() for line in output.splitlines() if line.strip()] or ["no message"])[-1]
    if "No module named 'tensorrt_llm'" in output:
        return OperatorError(
            "TensorRT-LLM is not installed for the Python that would run the workers",
            remedy="set `container.runtime` and run in its image (`snakemake build_image`), or "
            "install it (`pip install tensorrt_llm`), or set `engine.backend: torch`",
        )
    if any(sign in output for sign in ("libcuda.so", "CUDA driver", "NVML")):
        return OperatorError(
            f"TensorRT-LLM finds no usable NVIDIA driver where it was imported: {last}",
            remedy="check that `nvidia-smi` works there; in a container, that GPUs are handed in",
        )
    return OperatorError(
        f"TensorRT-LLM cannot be imported: {last}",
        remedy="its wheel, torch and CUDA must be those it was built with: reinstall it, or use its "
        "image (`container.runtime`)",
    )
