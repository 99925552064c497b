"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.protocol import TokenLogprob
from serving.text.token_text import TokenText

FLOOR = -9999.0
"""OpenAI's value for minus infinity, which JSON cannot express."""


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > FLOOR else FLOOR  # NaN too


def chat_logprobs(entries: Sequence[TokenLogprob], token_text: TokenText) -> dict[str, Any]:
    """`{"content": [...], "refusal": null}`."""

    def token(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, data = token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {
            **token(entry.token_id, entry.logprob),
            "top_logprobs": [token(token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprob], token_text: TokenText, first_offset: int
) -> tuple[dict[str, Any], int]:
    """The parallel lists, and the text offset (in characters) of the next token.

    A prompt's first token has null for its log-probabilities.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        text, _ = token_text(entry.token_id)
        tokens.append(text)
        if entry.logprob is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
        else:
            chosen = _finite(entry.logprob)
            top = {token_text(token_id)[0]: _finite(value) for token_id, value in entry.top}
            token_logprobs.append(chosen)
            top_logprobs.append({**top, text: chosen})
        offsets.append(first_offset)
        first_offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": offsets,
    }, first_offset
