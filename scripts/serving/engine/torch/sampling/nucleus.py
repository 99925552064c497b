"""Which tokens `top_k`, `top_p` and `min_p` leave: those at or above a probability of their row.

A threshold does not depend on how a sort orders equals, and needs no sort where there is a
quicker way to it. `top_p` keeps the likeliest tokens that together have `top_p` of the mass, and
whatever is as likely as the last of them.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# On CPU the answer mostly lies among so many candidates; if not, the row is sorted.
_TOP_CANDIDATES = 512


def top_k_threshold(probs: torch.Tensor, top_k: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, 1]`: the `top_k`-th largest probability of each row, 0 where `top_k` is 0.

    `probs` is `[B, vocab]`, `top_k` is int64 `[B]`, `width` its largest value.
    """
    largest = probs.topk(width, dim=-1).values
    threshold = largest.gather(1, (top_k[:, None] - 1).clamp_(min=0))
    return torch.where(top_k[:, None] > 0, threshold, 0.0)


def top_p_threshold(probs: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """`[B, 1]`: the largest probability such that those at or above it sum to `mass`.

    `probs` is float32 `[B, vocab]`, `mass` float32 `[B]`. Never above the row's largest, and 0
    where rounding keeps the whole row below `mass`. On CUDA nothing waits for the device.
    """
    if probs.is_cuda:
        if _has_triton():
            from serving.engine.torch.sampling.nucleus_triton import search_threshold

            return search_threshold(probs, mass)
        return _from_sorted(probs.sort(dim=-1, descending=True).values, mass)[0]
    width = min(_TOP_CANDIDATES, probs.shape[-1])
    threshold, is_found = _from_sorted(probs.topk(width, dim=-1).values, mass)
    if width < probs.shape[-1] and not bool(is_found.all()):
        rest = (~is_found).nonzero()[:, 0]
        ordered = probs[rest].sort(dim=-1, descending=True).values
        threshold[rest] = _from_sorted(ordered, mass[rest])[0]
    return threshold


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _from_sorted(ordered: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold from a row's largest probabilities, and whether `mass` is reached in them."""
    reached = ordered.cumsum(dim=-1) >= mass[:, None]
    is_found = reached[:, -1]
    first = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return torch.where(is_found[:, None], ordered.gather(1, first), 0.0), is_found
