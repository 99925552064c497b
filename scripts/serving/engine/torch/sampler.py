"""Logits to tokens: penalties, temperature, filters, logprobs, reproducible randomness.

The random number behind a token depends only on the request's seed and on the token's position in
the output. So a seeded request gives the same tokens in any batch, after a preemption, and when
another worker continues it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from serving.engine.torch.sequence import Sequence
from serving.protocol import SamplingParams, TokenLogprob

# Candidates looked at before falling back to a full sort of the vocabulary.
_TOP_CANDIDATES = 512


def sample(
    logits: torch.Tensor, sequences: Rows[Sequence]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose the next token of each sequence from its row of `logits` (`[B, vocab]`, float32)."""
    params = [sequence.sampling for sequence in sequences]
    wants_logprobs = [p.logprobs is not None for p in params]
    # What is reported is what the model said, before anything below changes it.
    raw = torch.log_softmax(logits, dim=-1) if any(wants_logprobs) else None
    logits = _penalize(logits, sequences)
    logits = _mask_stops(logits, sequences)
    chosen = logits.argmax(dim=-1)
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if random:
        rows = torch.tensor(random, device=logits.device)
        chosen[rows] = _draw(logits[rows], [sequences[i] for i in random])
    tokens = chosen.tolist()
    if raw is None:
        return tokens, [None] * len(tokens)
    return tokens, _report(raw, chosen, params)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one output position. Philox is counter-based: no state."""
    bits = np.random.Philox(key=seed, counter=[position, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def _penalize(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Presence and frequency penalties look at the output, repetition at prompt and output."""
    penalized = [
        i
        for i, s in enumerate(sequences)
        if s.sampling.presence_penalty
        or s.sampling.frequency_penalty
        or s.sampling.repetition_penalty != 1.0
    ]
    if not penalized:
        return logits
    device = logits.device
    rows = torch.tensor(penalized, device=device)
    chosen = [sequences[i] for i in penalized]
    counts = _token_counts([s.tokens[s.num_prompt :] for s in chosen], logits)
    seen = _token_counts([s.tokens for s in chosen], logits) > 0
    presence, frequency, repetition = torch.tensor(
        [
            (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
            for p in (s.sampling for s in chosen)
        ],
        device=device,
    ).T[:, :, None]
    part = logits[rows]
    repeated = torch.where(part > 0, part / repetition, part * repetition)
    part = torch.where(seen, repeated, part)
    part = part - counts * frequency - (counts > 0) * presence
    return logits.index_copy(0, rows, part)


def _token_counts(token_lists: list[list[int]], like: torch.Tensor) -> torch.Tensor:
    """`[B, vocab]`: how often each token occurs in each list."""
    counts = torch.zeros_like(like[: len(token_lists)])
    rows = [row for row, tokens in enumerate(token_lists) for _ in tokens]
    columns = [token for tokens in token_lists for token in tokens]
    index = torch.tensor([rows, columns], dtype=torch.long, device=like.device)
    ones = torch.ones(len(rows), dtype=counts.dtype, device=like.device)
    return counts.index_put_((index[0], index[1]), ones, accumulate=True)


def _mask_stops(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Until `min_tokens`, no token may end the request."""
    pairs = [
        (row, token)
        for row, s in enumerate(sequences)
        if s.num_output < s.sampling.min_tokens
        for token in s.sampling.stop_token_ids
    ]
    if not pairs:
        return logits
    index = torch.tensor(pairs, device=logits.device).T
    value = torch.tensor(-torch.inf, device=logits.device)
    return logits.index_put((index[0], index[1]), value)


def _draw(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Inverse-CDF sampling over the filtered probabilities, in vocabulary order."""
    params = [s.sampling for s in sequences]
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    probs = _filter(probs, params)
    cumulative = probs.double().cumsum(dim=-1)
    draws = [uniform(s.seed, s.num_output) for s in sequences]
    total = cumulative[:, -1:].contiguous()
    targets = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * total
    chosen = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding can put the target at the very end, past the last token with any probability.
    last = torch.searchsorted(cumulative, total)[:, 0]
    return torch.minimum(chosen, last)


def _filter(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what `top_k`, then `top_p`, then `min_p` exclude. Rows without filters stay whole."""
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    if not filtered:
        return probs
    rows = torch.tensor(filtered, device=probs.device)
    part = probs[rows]
    chosen = [params[i] for i in filtered]
    vocab = part.shape[-1]
    top_k = torch.tensor(
        [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in chosen], device=probs.device
    )[:, None]
    top_p, min_p = torch.tensor([(p.top_p, p.min_p) for p in chosen], device=probs.device).T[
        :, :, None
    ]
    width = min(_TOP_CANDIDATES, vocab)
    keep, order, is_complete = _keep(part, width, top_k, top_p, min_p)
    if not is_complete:
        keep, order, _ = _keep(part, vocab, top_k, top_p, min_p)
    mask = torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, keep)
    return probs.index_copy(0, rows, part * mask)


def _keep(
    probs: torch.Tensor,
    width: int,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Which of the `width` likeliest tokens stay, their ids, and whether no other one could."""
    top, order = probs.topk(width, dim=-1)
    rank = torch.arange(width, device=probs.device)
    in_k = rank < top_k
    # `top_p` refers to what `top_k` left, renormalised; without `top_k` that is everything.
    has_k = top_k < probs.shape[-1]
    mass = torch.where(has_k, (top * in_k).sum(-1, keepdim=True), torch.ones_like(top_p))
    before = (top * in_k).cumsum(dim=-1) - top * in_k
    in_p = before < top_p * mass
    in_p[:, 0] = True  # top_p 0 means the likeliest token
    keep = in_k & in_p & (top >= min_p * top[:, :1])
    cut = ~keep[:, -1]  # the last candidate is out, so all below it are
    return keep, order, width == probs.shape[-1] or bool(cut.all())


def _report(
    raw: torch.Tensor, chosen: torch.Tensor, params: list[SamplingParams]
) -> list[TokenLogprob | None]:
    width = min(max((p.logprobs or 0) for p in params), raw.shape[-1])
    top, ids = raw.topk(width, dim=-1) if width else (raw[:, :0], raw[:, :0].long())
    own = raw.gather(1, chosen[:, None])[:, 0].tolist()
    report: list[TokenLogprob | None] = []
    for row, (p, token, logprob) in enumerate(zip(params, chosen.tolist(), own, strict=True)):
        if p.logprobs is None:
            report.append(None)
            continue
        best = zip(ids[row, : p.logprobs].tolist(), top[row, : p.logprobs].tolist(), strict=True)
        report.append(TokenLogprob(token, logprob, list(best)))
    return report
