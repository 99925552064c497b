"""Logits to tokens: penalties, biases, temperature, filters, logprobs, reproducible randomness.

The random number behind a token depends only on the request's seed and on the token's position in
the output. So a seeded request gives the same tokens in any batch, after a preemption, and when
another worker continues it.

On CUDA nothing here waits for the device before `Pending.result`: what the host decides goes up in
one copy when the batch changes, and what was chosen comes down in one copy a step.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from serving.engine.core.sequence import Sequence
from serving.engine.torch.cuda.upload import upload
from serving.engine.torch.sampling import nucleus
from serving.engine.torch.sampling.batch import Filters, SamplingBatch
from serving.engine.torch.sampling.guidance import Masks
from serving.engine.torch.sampling.penalties import Penalties
from serving.protocol import TokenLogprob


class Pending:
    """Tokens that were chosen on the device. `tokens` is int64 `[B]`, usable there at once."""

    def __init__(self, tokens: torch.Tensor, report: LogprobReport | None) -> None:
        self.tokens, self._report = tokens, report
        outcome = tokens if report is None else report.packed(tokens)
        self._event: torch.cuda.Event | None = None
        self._outcome = outcome
        if outcome.is_cuda:
            self._outcome = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=True)
            self._outcome.copy_(outcome, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def result(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Wait; the tokens, and the logprobs of those rows that asked for them."""
        if self._event is not None:
            self._event.synchronize()
        if self._report is None:
            tokens: list[int] = self._outcome.tolist()
            return tokens, [None] * len(tokens)
        return self._report.read(self._outcome)


class Sampler:
    """Chooses the next tokens of an engine's batches. Used by one thread."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._penalties = Penalties(vocab_size, device)
        self._masks = Masks(device)
        self._batch: SamplingBatch | None = None

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> Pending:
        """Choose the next token of each sequence from its row of `logits` (`[B, vocab]`, float32).

        Where a sequence `needs_token_values`, its `tokens` must all be known.
        """
        batch = self._batch
        if batch is None or not batch.advance(sequences):
            batch = self._batch = SamplingBatch(sequences, logits.shape[-1], self._device)
        # Reports show the model's own probabilities, before anything below changes them.
        raw = logits
        logits = self._adjusted(logits, batch)
        tokens = logits.argmax(dim=-1)
        if batch.random is not None:
            rows = batch.random
            tokens = rows.put(tokens, self._draw(rows.take(logits), batch))
        report = None
        if batch.reported is not None:
            rows, widths = batch.reported, batch.widths
            report = LogprobReport(rows.take(raw), rows.take(tokens), rows.host, widths)
        return Pending(tokens, report)

    def _adjusted(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Penalties, then biases, then what must not come. `logits` itself stays as it is."""
        own = logits
        if batch.penalized is not None:
            rows = batch.penalized
            part = self._penalties.apply(rows.take(own), [batch.sequences[i] for i in rows.host])
            own = rows.put(own, part)
        if batch.biases is not None:
            at, values = batch.biases
            own = own.index_put((at[0], at[1]), values, accumulate=True)
        if batch.forbidden is not None:
            at = batch.forbidden
            never = torch.full((), -torch.inf, device=own.device)
            own = own.index_put((at[0], at[1]), never)
        if batch.guided is not None:
            rows = batch.guided
            guided = [batch.sequences[i] for i in rows.host]
            forbidden = self._masks.forbidden(guided, own.shape[-1])
            own = rows.put(own, rows.take(own).masked_fill(forbidden, -torch.inf))
        return own

    def _draw(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        """Inverse-CDF sampling over the filtered probabilities, in vocabulary order."""
        probs = torch.softmax(logits / batch.temperature, dim=-1)
        if batch.filters is not None:
            rows = batch.filters.rows
            probs = rows.put(probs, _filter(rows.take(probs), batch.filters))
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:].contiguous()
        chosen = torch.searchsorted(cumulative, batch.draws[:, None] * total, right=True)[:, 0]
        # Rounding can put the target at the very end, past the last token with any probability.
        last = torch.searchsorted(cumulative, total)[:, 0]
        return torch.minimum(chosen, last).clamp_(max=logits.shape[-1] - 1)


def _filter(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Zero what `top_k`, then `top_p`, then `min_p` exclude."""
    if filters.widest_k:
        threshold = nucleus.top_k_threshold(probs, filters.top_k, filters.widest_k)
        probs = probs * (probs >= threshold)
    if filters.has_top_p:
        # `top_p` refers to what `top_k` left, renormalised.
        mass = filters.top_p * probs.sum(dim=-1)
        threshold = nucleus.top_p_threshold(probs, mass)
        threshold = torch.where(filters.top_p[:, None] < 1, threshold, 0.0)
        probs = probs * (probs >= threshold)
    if filters.has_min_p:
        threshold = filters.min_p[:, None] * probs.amax(dim=-1, keepdim=True)
        probs = probs * (probs >= threshold)
    return probs


def report_tokens(logits: torch.Tensor, tokens: list[int], widths: list[int]) -> Pending:
    """Log-probabilities of `tokens` that are there already, a row of `logits` for each."""
    (given,) = upload([np.array(tokens, dtype=np.int64)], logits.device)
    return Pending(given, LogprobReport(logits, given, list(range(len(tokens))), widths))


class LogprobReport:
    """Log-probabilities of chosen tokens and of the likeliest ones, for some rows of a batch.

    `rows` are their places in the batch, `widths` how many alternatives each of them wants.
    """

    def __init__(
        self, raw: torch.Tensor, chosen: torch.Tensor, rows: list[int], widths: list[int]
    ) -> None:
        self._rows, self._widths = rows, widths
        logprobs = torch.log_softmax(raw, dim=-1)
        self._own = logprobs.gather(1, chosen[:, None])
        self._width = min(max(widths), raw.shape[-1])
        self._top, self._ids = logprobs.topk(self._width, dim=-1)

    def packed(self, tokens: torch.Tensor) -> torch.Tensor:
        """All numbers in one float64 vector, in which ids are exact."""
        parts = (tokens, self._own, self._ids, self._top)
        return torch.cat([part.reshape(-1).double() for part in parts])

    def read(self, outcome: torch.Tensor) -> tuple[list[int], list[TokenLogprob | None]]:
        """What `packed` packed, on the host."""
        count, width = len(self._rows), self._width
        num_tokens = len(outcome) - count * (1 + 2 * width)
        numbers = outcome.tolist()
        tokens = [int(number) for number in numbers[:num_tokens]]
        own = numbers[num_tokens : num_tokens + count]
        ids = numbers[num_tokens + count :]
        top = ids[count * width :]
        report: list[TokenLogprob | None] = [None] * num_tokens
        for i, (row, wanted) in enumerate(zip(self._rows, self._widths, strict=True)):
            first, last = i * width, i * width + min(wanted, width)
            best = [(int(t), p) for t, p in zip(ids[first:last], top[first:last], strict=True)]
            report[row] = TokenLogprob(tokens[row], own[i], best)
        return tokens, report
