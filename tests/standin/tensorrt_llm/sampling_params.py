"""Test code. SamplingParams and GuidedDecodingParams: generated fields, the contract's rules."""

from __future__ import annotations

import os
from typing import Any

from tensorrt_llm import _generate


class _GuidedRules:
    __slots__ = ()

    def _validate(self: Any) -> None:
        guides = ("json", "regex", "grammar", "json_object", "structural_tag")
        if sum(bool(getattr(self, name)) for name in guides) > 1:
            raise ValueError("Only one guided decoding parameter may be set")


GuidedDecodingParams: Any = _generate.record(
    "GuidedDecodingParams", "tensorrt_llm.sampling_params", bases=(_GuidedRules,), kw_only=True
)


class _SamplingRules:
    __slots__ = ()

    def __post_init__(self: Any) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of or self.n
        self._validate()

    def _validate(self: Any) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        allowed = os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING")
        if self.best_of > 1 and self._greedy_decoding and not allowed:
            raise ValueError(
                f"Greedy decoding in the LLM API does not allow multiple returns: "
                f"best_of={self.best_of}"
            )
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise ValueError(f"truncate_prompt_tokens must be >= 1: {self.truncate_prompt_tokens}")
        if self.guided_decoding is not None:
            self.guided_decoding._validate()
        self.logprobs = self.logprobs and int(self.logprobs)
        self.prompt_logprobs = self.prompt_logprobs and int(self.prompt_logprobs)

    @property
    def _greedy_decoding(self: Any) -> bool:
        unset = self.temperature is None and self.top_p is None and self.top_k is None
        return not self.use_beam_search and (
            unset or self.top_k == 1 or self.top_p == 0 or self.temperature == 0
        )

    def _setup(self: Any, tokenizer: Any) -> None:
        """Runs only where `end_id` was not given: so only then are stop strings tokenized."""
        self.end_id = tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        for text, words in (("bad", "_bad_word_ids"), ("stop", "_stop_word_ids")):
            given = getattr(self, text)
            if given is not None:
                listed = [given] if isinstance(given, str) else given
                setattr(self, words, [tokenizer.encode(each) for each in listed])

    def _get_words(self: Any, kind: str) -> list[list[int]]:
        words = [[token] for token in getattr(self, f"{kind}_token_ids") or []]
        given, encoded = getattr(self, kind), getattr(self, f"_{kind}_word_ids")
        if given is None:
            return words
        if encoded is None:
            raise RuntimeError(
                f"SamplingParams.{kind} ({given}) is not processed by tokenizer, "
                "please call the setup method."
            )
        return words + encoded

    def _get_stop_reasons_and_words(self: Any) -> list[tuple[int | str, list[int]]]:
        reasons: list[int | str] = list(self.stop_token_ids or [])
        if self.stop is not None:
            reasons += [self.stop] if isinstance(self.stop, str) else self.stop
        return list(zip(reasons, self._get_words("stop"), strict=True))


SamplingParams: Any = _generate.record(
    "SamplingParams",
    "tensorrt_llm.sampling_params",
    bases=(_SamplingRules,),
    hidden={"_bad_word_ids": None, "_stop_word_ids": None, "_stream_interval": None},
    kw_only=True,
)
