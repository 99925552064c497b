"""What the host knows of a batch to be sampled, put on the device once for several steps.

While the same sequences go on, each by one token a step, everything stays as it is but the random
numbers, and those of the next steps were uploaded along with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serving.engine.core.sequence import Sequence
from serving.engine.torch.cuda.upload import upload
from serving.engine.torch.sampling.draws import uniforms
from serving.protocol import SamplingParams

# For so many steps random numbers are made at a time: about a kilobyte for 8 sequences.
_NUM_STEPS = 16


@dataclass
class Rows:
    """Some rows of a batch: on the host, and on the device (None: they are all of its rows)."""

    host: list[int]
    index: torch.Tensor | None

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        return batch if self.index is None else batch.index_select(0, self.index)

    def put(self, batch: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A copy of `batch` with these rows replaced."""
        return part if self.index is None else batch.index_copy(0, self.index, part)


@dataclass
class Filters:
    """Filters of `rows` of the random ones. A `top_k` of 0, `top_p` of 1, `min_p` of 0 are off."""

    rows: Rows
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    widest_k: int
    has_top_p: bool
    has_min_p: bool


class SamplingBatch:
    """The parameters of `sequences`, from their present positions on."""

    def __init__(
        self, sequences: Sequences[Sequence], vocab_size: int, device: torch.device
    ) -> None:
        self.sequences = list(sequences)
        self._outputs = [s.num_output for s in sequences]
        self._step, self._num_steps = 0, _NUM_STEPS
        self.random: Rows | None = None
        self.filters: Filters | None = None
        self.reported: Rows | None = None
        self.penalized: Rows | None = None
        self.guided: Rows | None = None
        self.biases: tuple[torch.Tensor, torch.Tensor] | None = None
        self.forbidden: torch.Tensor | None = None
        if not all(s.is_plain for s in sequences):
            self._build(vocab_size, device)

    def advance(self, sequences: Sequences[Sequence]) -> bool:
        """Whether this is the step after the last one; if so, take it."""
        step = self._step + 1
        if step >= self._num_steps or len(sequences) != len(self.sequences):
            return False
        for old, new, first in zip(self.sequences, sequences, self._outputs, strict=True):
            if old is not new or new.num_output != first + step:
                return False
        self._step = step
        return True

    @property
    def draws(self) -> torch.Tensor:
        """Float64 `[R]`: the random numbers of this step, for the `random` rows."""
        return self._draws[self._step]

    def _build(self, vocab_size: int, device: torch.device) -> None:
        params = [s.sampling for s in self.sequences]
        uploads = _Uploads()

        random = _where(params, lambda p: p.temperature > 0)
        drawn = [params[i] for i in random]
        uploads.rows("random", random, len(params))
        uploads.floats("temperature", [p.temperature for p in drawn])
        uploads.add("draws", self._random_numbers(random))

        filtered = _where(drawn, lambda p: p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
        cut = [drawn[i] for i in filtered]
        # A `top_k` of the whole vocabulary or more excludes nothing.
        top_k = [p.top_k if p.top_k < vocab_size else 0 for p in cut]
        uploads.rows("filtered", filtered, len(drawn))
        uploads.ints("top_k", top_k)
        uploads.floats("top_p", [p.top_p for p in cut])
        uploads.floats("min_p", [p.min_p for p in cut])

        reported = _where(params, lambda p: p.logprobs is not None)
        uploads.rows("reported", reported, len(params))
        penalized = [row for row, s in enumerate(self.sequences) if s.is_penalized]
        uploads.rows("penalized", penalized, len(params))
        guided = [row for row, s in enumerate(self.sequences) if s.guidance is not None]
        uploads.rows("guided", guided, len(params))
        self._add_biases(uploads)
        self._add_forbidden(uploads, vocab_size)

        uploaded = uploads.send(device)

        def rows(name: str, host: list[int]) -> Rows | None:
            return Rows(host, uploaded.get(name)) if host else None

        self.random = rows("random", random)
        self._draws = uploaded["draws"]
        self.temperature = uploaded["temperature"].float()[:, None]
        if (of_random := rows("filtered", filtered)) is not None:
            self.filters = Filters(
                of_random,
                uploaded["top_k"],
                uploaded["top_p"].float(),
                uploaded["min_p"].float(),
                widest_k=max(top_k),
                has_top_p=any(p.top_p < 1.0 for p in cut),
                has_min_p=any(p.min_p > 0.0 for p in cut),
            )
        self.reported = rows("reported", reported)
        self.widths = [params[i].logprobs or 0 for i in reported]
        self.penalized = rows("penalized", penalized)
        self.guided = rows("guided", guided)
        at, values = uploaded["bias_at"], uploaded["bias"]
        self.biases = (at, values.float()) if values.numel() else None
        at = uploaded["forbidden_at"]
        self.forbidden = at if at.numel() else None

    def _random_numbers(self, rows: list[int]) -> npt.NDArray[np.float64]:
        """`[_NUM_STEPS, R]`."""
        seeds = np.array([self.sequences[i].seed for i in rows], dtype=np.uint64)
        first = np.array([self._outputs[i] for i in rows], dtype=np.uint64)
        return uniforms(seeds, first + np.arange(_NUM_STEPS, dtype=np.uint64)[:, None])

    def _add_biases(self, uploads: _Uploads) -> None:
        pairs = [
            (row, token, bias)
            for row, s in enumerate(self.sequences)
            for token, bias in s.sampling.logit_bias
        ]
        uploads.pairs("bias_at", [(row, token) for row, token, _ in pairs])
        uploads.floats("bias", [bias for _, _, bias in pairs])

    def _add_forbidden(self, uploads: _Uploads, vocab_size: int) -> None:
        """Until `min_tokens`, no token may end the request. Guided ones see to it themselves."""
        pairs: list[tuple[int, int]] = []
        for row, (sequence, output) in enumerate(zip(self.sequences, self._outputs, strict=True)):
            num_left = sequence.sampling.min_tokens - output
            if num_left > 0 and sequence.guidance is None:
                stops = sequence.sampling.stop_token_ids
                pairs += [(row, token) for token in stops if token < vocab_size]
                self._num_steps = min(self._num_steps, num_left)
        uploads.pairs("forbidden_at", pairs)


class _Uploads:
    """Named arrays that go to the device together."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        self._arrays[name] = array

    def ints(self, name: str, values: list[int]) -> None:
        self.add(name, np.array(values, dtype=np.int64))

    def floats(self, name: str, values: list[float]) -> None:
        self.add(name, np.array(values, dtype=np.float64))

    def rows(self, name: str, rows: list[int], count: int) -> None:
        """Nothing where they are all of the `count` rows."""
        if len(rows) != count:
            self.ints(name, rows)

    def pairs(self, name: str, pairs: list[tuple[int, int]]) -> None:
        """`[2, N]`: rows, then columns."""
        self.add(name, np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy())

    def send(self, device: torch.device) -> dict[str, torch.Tensor]:
        return dict(zip(self._arrays, upload(list(self._arrays.values()), device), strict=True))


def _where(params: list[SamplingParams], condition: Callable[[SamplingParams], bool]) -> list[int]:
    return [i for i, p in enumerate(params) if condition(p)]
