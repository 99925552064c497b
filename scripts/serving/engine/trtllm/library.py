"""The imported TensorRT-LLM: its modules, its version, and the making of its `LLM`.

The only module that imports it, and only in a worker, since that takes seconds and a GPU. The build
asks for the version in a process of its own (`build/installed.py`).
"""

from __future__ import annotations

import importlib
from typing import Any

from msgspec import Struct

from serving.engine.trtllm.arguments import LlmArguments
from serving.engine.trtllm.failures import explain_start, missing_library
from serving.engine.trtllm.requests.context import Runtime
from serving.engine.trtllm.versions import LAST_WITH_TENSORRT, Version, parse_version
from serving.errors import OperatorError


class LoadedLibrary(Struct, frozen=True):
    """The imported package: `top` is `tensorrt_llm`, `llmapi` and `llm_args` its modules."""

    version: Version
    top: Any
    llmapi: Any
    llm_args: Any

    def runtime(self, llm: Any) -> Runtime:
        """The parts that requests to `llm` need."""
        try:
            logprob = importlib.import_module("tensorrt_llm.executor.result").Logprob
        except (ImportError, AttributeError):
            logprob = None
        return Runtime(
            llm,
            self.top.SamplingParams,
            self.llmapi.DisaggregatedParams,
            logprob,
            self.llmapi.GuidedDecodingParams,
        )

    def find_class(self, name: str) -> Any:
        """None when this version has none of that name."""
        return getattr(self.llmapi, name, None) or getattr(self.llm_args, name, None)


def load_library() -> LoadedLibrary:
    """Import it. Raises OperatorError when it is missing, broken or not supported."""
    try:
        top = importlib.import_module("tensorrt_llm")
        version = parse_version(top.__version__)
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        llm_args = importlib.import_module("tensorrt_llm.llmapi.llm_args")
    except ImportError as exc:
        raise missing_library(exc) from exc
    return LoadedLibrary(version, top, llmapi, llm_args)


def load_llm(library: LoadedLibrary, arguments: LlmArguments, flow: str | None) -> Any:
    """Make the `LLM`, which loads the model: minutes. Raises OperatorError."""
    if flow == "trtllm-build":
        if library.version.line > LAST_WITH_TENSORRT:
            raise OperatorError(
                f"the engine was built with trtllm-build, which TensorRT-LLM {library.version} "
                "can no longer load",
                remedy="set `engine.flow: auto` and run the serve target again",
            )
        kind = importlib.import_module("tensorrt_llm._tensorrt_engine").LLM
        args_class = library.find_class("TrtLlmArgs")
    else:
        kind, args_class = library.top.LLM, library.find_class("TorchLlmArgs")
    try:
        values = arguments.fitted(args_class, library.find_class, library.version)
        return kind(**values)
    except OperatorError:
        raise
    except Exception as exc:
        raise explain_start(exc) from exc
