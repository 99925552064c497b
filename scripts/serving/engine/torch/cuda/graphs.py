"""CUDA graphs of decode steps: captured once for each batch size, replayed for every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MAX_BATCH = 256


class DecodeGraph:
    """A captured decode step of `size` rows; rows without a sequence have length 0.

    `inputs` is int32 `[5 * size]`: ids, positions, pool rows, slots and lengths. `logits`
    `[size, vocab]` is valid after `replay`, until the next one.
    """

    logits: torch.Tensor

    def __init__(
        self, size: int, device: torch.device, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """`compute` is the step: `inputs` `[5, size]` to logits."""
        self.size, self._device, self._compute = size, device, compute
        self.inputs = torch.zeros(5 * size, dtype=torch.int32, device=device)
        self.inputs[2 * size : 3 * size] = -1  # nothing is kept while warming up
        self._graph: Any = None

    def capture(self, memory: Any) -> Any:
        """Capture within `memory`, what the graph before returned (None for the first one)."""
        self._graph = torch.cuda.CUDAGraph()
        self._step()  # compiles, and makes libraries allocate what they keep
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(self._graph, pool=memory):
            self.logits = self._step()
        return self._graph.pool()

    def replay(self) -> None:
        """Compute `logits` of the present `inputs`, on the current stream."""
        self._graph.replay()

    def _step(self) -> torch.Tensor:
        return self._compute(self.inputs.view(5, self.size))


def graph_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 up to the batch size; largest first, so that memory is shared."""
    largest = min(max_batch_size, _MAX_BATCH)
    sizes = {1, 2, 4, *range(8, largest + 1, 8), largest}
    return sorted((size for size in sizes if size <= largest), reverse=True)
