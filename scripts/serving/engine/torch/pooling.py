"""Embeddings: the model's last hidden states, caught from a step and pooled over each prompt.

Knows which rows of a step belong to which request; does not know where the request came from, nor
how its vector is normalized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from serving.engine.core import sequence as core
from serving.engine.core.step import Chunk


class Pooled:
    """The vectors `[H]` of the sequences whose prompts a step completes; on the device."""

    def __init__(self) -> None:
        self._vectors: list[tuple[core.Sequence, torch.Tensor]] = []

    def add(self, sequence: core.Sequence, vector: torch.Tensor) -> None:
        self._vectors.append((sequence, vector))

    def deliver(self) -> None:
        """Wait for them, and give each sequence its own."""
        for sequence, vector in self._vectors:
            sequence.embedding = vector.cpu().numpy().astype("<f4").tobytes()


class Pooler:
    """Pools the hidden states of one model. A prompt may be computed in several steps."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._sums: WeakKeyDictionary[core.Sequence, torch.Tensor] = WeakKeyDictionary()

    @contextmanager
    def catching(self, chunks: Sequence[Chunk]) -> Iterator[list[torch.Tensor]]:
        """Catch the hidden states `[T, H]` of the step computed inside, if a chunk wants them."""
        caught: list[torch.Tensor] = []
        if not any(chunk.sequence.request.pooling for chunk in chunks):
            yield caught
            return

        def catch(module: Any, args: Any, output: Any) -> None:
            caught.append(output[0][0])  # the last hidden state, in a batch of one

        handle = self._model.base_model.register_forward_hook(catch)
        try:
            yield caught
        finally:
            handle.remove()

    def pool(self, chunks: Sequence[Chunk], caught: list[torch.Tensor]) -> Pooled:
        """`chunks` lie in the step one after the other."""
        pooled = Pooled()
        start = 0
        for chunk in chunks if caught else ():
            rows = caught[0][start : start + chunk.length]
            start += chunk.length
            pooling = chunk.sequence.request.pooling
            if pooling == "last" and chunk.samples:
                pooled.add(chunk.sequence, rows[-1].float())
            elif pooling == "mean":
                self._add(chunk, rows.float().sum(0), pooled)
        return pooled

    def _add(self, chunk: Chunk, rows: torch.Tensor, pooled: Pooled) -> None:
        sequence = chunk.sequence
        if chunk.start > 0:  # else it begins, perhaps again after a preemption
            rows = rows + self._sums.pop(sequence)
        if chunk.samples:
            pooled.add(sequence, rows / sequence.num_prompt)
            self._sums.pop(sequence, None)
        else:
            self._sums[sequence] = rows
