"""One of our requests as the arguments of `tensorrt_llm.SamplingParams`.

Its defaults are traps, so every argument that matters is set: `max_tokens` (default: 32), an end id
(without one it needs a tokenizer), a seed (without one all unseeded requests draw alike), `top_p`
(without it sampling is greedy). The frontend does stop strings and detokenization.
"""

from __future__ import annotations

import secrets
from typing import Any

from msgspec import Struct

from serving.errors import InvalidRequest
from serving.protocol import EngineRequest, SamplingParams

_SEED_MASK = 2**64 - 1


class Vocabulary(Struct, frozen=True):
    """The size of the vocabulary and its special ids. `eos` may be empty, as in a base model."""

    size: int
    eos: tuple[int, ...]
    pad: int | None


def num_to_generate(request: EngineRequest, num_prompt: int, max_model_len: int) -> int:
    """Tokens that may follow the `num_prompt` tokens which the engine takes as its prompt.

    What was generated before counts: it is part of that prompt. Raises InvalidRequest when
    nothing is left.
    """
    generated = num_prompt - request.num_prompt_tokens
    left = request.sampling.max_tokens - generated
    if left < 1:
        raise InvalidRequest(
            f"max_tokens {request.sampling.max_tokens} leaves nothing to generate",
            param="max_tokens",
            code="invalid_max_tokens",
        )
    return min(left, max_model_len - num_prompt)


def sampling_arguments(
    request: EngineRequest, *, num_prompt: int, max_tokens: int, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Keyword arguments of `SamplingParams`; `num_prompt` as in `num_to_generate`."""
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "seed": (secrets.randbits(63) if sampling.seed is None else sampling.seed & _SEED_MASK),
        "detokenize": False,
        "add_special_tokens": False,
        "skip_special_tokens": False,
    }
    arguments |= _choice(sampling)
    arguments |= _ends(request, num_prompt, vocabulary)
    if sampling.logprobs is not None:
        # 0 reads as "none at all" in places; the chosen token is in what 1 reports.
        arguments["logprobs"] = max(1, sampling.logprobs)
    return arguments


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    """How a token is drawn, and what the penalties are."""
    chosen: dict[str, Any]
    if sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0:
        # Temperature 0 is refused by its C++ sampler, and 1.0 ignores it beside a `top_p`.
        chosen = {"top_k": 1}
    else:
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k > 0:
            chosen["top_k"] = sampling.top_k
        if sampling.min_p > 0:
            chosen["min_p"] = sampling.min_p
    if sampling.repetition_penalty != 1:
        chosen["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty:
        chosen["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        chosen["frequency_penalty"] = sampling.frequency_penalty
    return chosen


def _ends(request: EngineRequest, num_prompt: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """What ends a request before `max_tokens`."""
    sampling = request.sampling
    stops = sampling.stop_token_ids
    end_id = next((token for token in vocabulary.eos if token in stops), None)
    pad_id = next((i for i in (vocabulary.pad, *vocabulary.eos) if i is not None), 0)
    ends: dict[str, Any] = {"pad_id": pad_id}
    if end_id is not None:
        ends["end_id"] = end_id
    elif vocabulary.eos or not stops:
        ends |= {"end_id": vocabulary.eos[0] if vocabulary.eos else -1, "ignore_eos": True}
    else:
        ends["end_id"] = end_id = stops[0]
    others = [token for token in stops if token != end_id]
    min_tokens = sampling.min_tokens - (num_prompt - request.num_prompt_tokens)
    if min_tokens > 0:
        # It holds back the end id only: other stops are left to `CompletionReader`, which can count.
        ends["min_tokens"] = min_tokens
    elif others:
        ends["stop_token_ids"] = others
    return ends
