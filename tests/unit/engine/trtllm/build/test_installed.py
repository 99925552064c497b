"""Asking for the library's version, and what is said when it cannot be had."""

from __future__ import annotations

import subprocess

import pytest
from serving.engine.trtllm.build.installed import PYTHON, probe_library
from serving.errors import OperatorError
from serving.progress import Report
from unit.engine.trtllm.build.library_fakes import FakeRun


class Failing:
    def __init__(self, said: str) -> None:
        self.said = said

    def __call__(
        self, argv: list[str], *, report: Report | None = None
    ) -> subprocess.CompletedProcess[str]:
        assert argv[0] == PYTHON
        return subprocess.CompletedProcess(argv, 1, self.said, "")


def test_version_is_found_behind_its_banner() -> None:
    library = probe_library(FakeRun("1.3.0rc27"))
    assert (str(library.version), library.cuda) == ("1.3.0rc27", "13.0")


def test_unsupported_version_is_refused_by_name() -> None:
    with pytest.raises(OperatorError, match=r"TensorRT-LLM 0\.21\.0"):
        probe_library(FakeRun("0.21.0"))


@pytest.mark.parametrize(
    ("said", "what", "remedy"),
    [
        ("ModuleNotFoundError: No module named 'tensorrt_llm'\n", "not installed", "build_image"),
        (
            "ImportError: libcuda.so.1: cannot open shared object file\n",
            "no usable NVIDIA driver",
            "nvidia-smi",
        ),
        ("ImportError: undefined symbol: _ZN3c10\n", "undefined symbol", "reinstall"),
        ("", "no message", "reinstall"),
    ],
)
def test_failed_import_is_an_error_with_a_remedy(said: str, what: str, remedy: str) -> None:
    with pytest.raises(OperatorError) as caught:
        probe_library(Failing(said))
    assert what in caught.value.what
    assert remedy in caught.value.remedy
