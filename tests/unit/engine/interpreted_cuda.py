"""The CUDA path on a CPU: Triton's interpreter computes the kernels, and graphs compute anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving.engine.torch.cpu import packed_linear
from serving.engine.torch.cuda.graphs import DecodeGraph
from serving.engine.torch.cuda.runner import CudaRunner
from unit.engine import torch_rig


class InterpretedGraph(DecodeGraph):
    """A graph that computes its step anew each time; everything around it is the product's."""

    def capture(self, memory: Any) -> None:
        self.logits = self._step().clone()

    def replay(self) -> None:
        self.logits.copy_(self._step())


class InterpretedRunner(CudaRunner):
    """The CUDA path on a CPU."""

    graph_class = InterpretedGraph
    graph_sizes = staticmethod(lambda _: [4, 2])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CudaRunner` runs on the CPU."""
    monkeypatch.setattr(torch_rig, "DEADLINE_S", 120.0)
    monkeypatch.setattr(packed_linear, "can_pack", lambda *_: False)
    nothing = {name: lambda *_: None for name in ("synchronize", "empty_cache")}
    for name, fake in nothing.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    processors = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
