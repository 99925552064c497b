"""Reads one request's cumulative results, and returns each token once.

This is on the path of every token. It also decides where a request ends. The library checks for
`max_tokens` before it checks for stop tokens, keeps an end id in its tokens but drops a stop id,
and `token_ids_diff` may leave out a first token.
"""

from __future__ import annotations

from typing import Any

from serving.protocol import EngineOutput, EngineRequest, ErrorInfo, FinishReason, TokenLogprob

UNLIKELY = -9999.0
"""Log-probability of a token for which the library has none, as in OpenAI's API."""

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "not_finished": "length",  # a finished `context_only` request, in some versions
    "cancelled": "cancelled",
}


class CompletionReader:
    """Remembers which tokens it has returned. The engine's prompt is the first `num_prompt` tokens
    of the request. The caller has the tokens after those already, so they do not come again."""

    __slots__ = ("_logprobs", "_min_left", "_request_id", "_stops", "finished", "num_returned")

    def __init__(self, request: EngineRequest, num_prompt: int) -> None:
        sampling = request.sampling
        self.num_returned = len(request.token_ids) - num_prompt
        self.finished = False
        self._request_id = request.request_id
        self._stops = frozenset(sampling.stop_token_ids)
        self._logprobs = sampling.logprobs
        # Index of the first token that may be a stop, counted in the engine's output.
        self._min_left = sampling.min_tokens - (num_prompt - request.num_prompt_tokens)

    def advance(self, completion: Any) -> EngineOutput | None:
        """What `completion` (a `CompletionOutput`) adds; None when that is nothing.

        The output with a finish_reason is the last one, also when the library would go on.
        """
        tokens = completion.token_ids
        start = self.num_returned
        new = tokens[start:]
        reason = completion.finish_reason
        if reason is None:
            if not new:
                return None
            if self._stops.isdisjoint(new) and self._logprobs is None:
                self.num_returned = start + len(new)
                return EngineOutput(self._request_id, new)
        return self._ended(completion, start, new, reason)

    def _ended(
        self, completion: Any, start: int, new: list[int], reason: str | None
    ) -> EngineOutput | None:
        """The same off the shortest path: with stops, log-probabilities or an end."""
        stop_token_id = None
        for index, token in enumerate(new):
            if token in self._stops and start + index >= self._min_left:
                reason, stop_token_id, new = "stop", token, new[:index]
                break
        else:
            if reason == "stop" and isinstance(completion.stop_reason, int):
                stop_token_id = completion.stop_reason
        self.num_returned = start + len(new)
        self.finished = reason is not None
        if not new and not self.finished:
            return None
        if reason is not None and reason not in _FINISH:
            error = ErrorInfo("EngineFailed", f"TensorRT-LLM ended it with {reason!r}")
            return EngineOutput(self._request_id, new, "error", error=error)
        return EngineOutput(
            self._request_id,
            new,
            None if reason is None else _FINISH[reason],
            stop_token_id=stop_token_id,
            logprobs=self._logprobs_of(completion, start, new),
        )

    def _logprobs_of(
        self, completion: Any, start: int, new: list[int]
    ) -> list[TokenLogprob] | None:
        if self._logprobs is None or not new:
            return None
        entries = completion.logprobs or []
        # Aligned at the end: a decode engine may know none for the first, fetched token.
        missing = len(completion.token_ids) - len(entries)
        missing = max(0, missing)
        return [
            token_logprob(
                token,
                entries[index - missing] if missing <= index < missing + len(entries) else None,
                self._logprobs,
            )
            for index, token in enumerate(new, start)
        ]


def token_logprob(token: int, entry: Any, num_top: int) -> TokenLogprob:
    """`entry` is a map of token id to something with `logprob`, a bare float, or None."""
    if entry is None:
        return TokenLogprob(token, UNLIKELY, [])
    if not isinstance(entry, dict):
        return TokenLogprob(token, float(entry), [])
    ranked = sorted(
        ((int(i), float(value.logprob)) for i, value in entry.items()), key=lambda pair: -pair[1]
    )
    own = next((logprob for i, logprob in ranked if i == token), UNLIKELY)
    return TokenLogprob(token, own, ranked[:num_top])
