"""Which tokens a sequence has seen, kept on the device, and what that does to its logits.

Each penalised sequence has a row of counts for as long as it lives. A step adds the tokens that
are new since the last one, so its cost does not grow with the sequences, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from serving.engine.core.sequence import Sequence, State
from serving.engine.torch.cuda.upload import upload


class Penalties:
    """Token counts of the penalised sequences of one engine. Token values must be known."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(0, vocab_size, device=device)  # of output
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._slots: dict[Sequence, int] = {}
        self._num_counted: dict[Sequence, int] = {}

    def apply(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Presence and frequency penalties look at the output, repetition at prompt and output.

        `logits` is `[B, vocab]` float32, a row for each of `sequences`, and stays as it is.
        """
        self._make_room(sequences)
        prompt, output = self._new_tokens(sequences)
        numbers = [
            (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
            for p in (s.sampling for s in sequences)
        ]
        slots, prompt_at, output_at, values = upload(
            [
                np.array([self._slots[s] for s in sequences], dtype=np.int64),
                np.array(prompt, dtype=np.int64).reshape(-1, 2).T.copy(),
                np.array(output, dtype=np.int64).reshape(-1, 2).T.copy(),
                np.array(numbers, dtype=np.float64).T.copy(),
            ],
            self._device,
        )
        if prompt:
            yes = torch.ones((), dtype=torch.bool, device=self._device)
            self._in_prompt.index_put_((prompt_at[0], prompt_at[1]), yes)
        if output:
            ones = torch.ones((), device=self._device)
            self._counts.index_put_((output_at[0], output_at[1]), ones, accumulate=True)
        presence, frequency, repetition = values.float()[:, :, None]
        counts = self._counts.index_select(0, slots)
        is_out = counts > 0
        seen = self._in_prompt.index_select(0, slots) | is_out
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
        penalized: torch.Tensor = logits - counts * frequency - is_out * presence
        return penalized

    def _make_room(self, sequences: Rows[Sequence]) -> None:
        """A slot for each; those of sequences that have ended are free again."""
        missing = [s for s in sequences if s not in self._slots]
        if not missing:
            return
        wanted = set(sequences)  # also those that were aborted during the step
        ended = [s for s in self._slots if s.state in (State.DONE, State.EXPORTED)]
        for sequence in ended:
            if sequence not in wanted:
                del self._slots[sequence], self._num_counted[sequence]
        taken = set(self._slots.values())
        free = [slot for slot in range(len(self._counts)) if slot not in taken]
        if len(free) < len(missing):
            num_more = max(len(missing) - len(free), len(self._counts))
            free += range(len(self._counts), len(self._counts) + num_more)
            self._counts = _grown(self._counts, num_more)
            self._in_prompt = _grown(self._in_prompt, num_more)
        slots = free[: len(missing)]
        (index,) = upload([np.array(slots, dtype=np.int64)], self._device)
        self._counts.index_fill_(0, index, 0)
        self._in_prompt.index_fill_(0, index, False)
        for sequence, slot in zip(missing, slots, strict=True):
            self._slots[sequence], self._num_counted[sequence] = slot, 0

    def _new_tokens(
        self, sequences: Rows[Sequence]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(slot, token) of the prompt's and of the output's tokens that are not counted yet."""
        prompt: list[tuple[int, int]] = []
        output: list[tuple[int, int]] = []
        for sequence in sequences:
            slot, first = self._slots[sequence], self._num_counted[sequence]
            for token in sequence.tokens[first : sequence.num_prompt]:
                prompt.append((slot, token))
            for token in sequence.tokens[max(first, sequence.num_prompt) :]:
                output.append((slot, token))
            self._num_counted[sequence] = len(sequence.tokens)
        return prompt, output


def _grown(rows: torch.Tensor, num_more: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(num_more, rows.shape[1])])
