"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

import codecs
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
    entries: Sequence[TokenLogprob], token_text: TokenText, place: TextPlace
) -> dict[str, Any]:
    """The parallel lists. `place` counts the characters of the choice's text.

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
            token_logprobs.append(_finite(entry.logprob))
            top_logprobs.append(_by_text(entry, token_text))
        offsets.append(place.of_next(entry.token_id))
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": offsets,
    }


def _by_text(entry: TokenLogprob, token_text: TokenText) -> dict[str, float]:
    """Every token's log-probability by its text.

    Different tokens can decode to the same text, parts of a character above all. The second and
    later ones are keyed by `token_id:ID`; the chosen token has its text's key.
    """
    logprobs = {token_text(entry.token_id)[0]: _finite(entry.logprob)}
    for token_id, logprob in entry.top:
        if token_id == entry.token_id:
            continue
        text = token_text(token_id)[0]
        key = f"token_id:{token_id}" if text in logprobs else text
        logprobs[key] = _finite(logprob)
    return logprobs


class TextPlace:
    """Where the next token begins in the text of one choice, in characters.

    A token that begins inside a character begins where that character does.
    """

    def __init__(self, token_text: TokenText, skipped: frozenset[int] = frozenset()) -> None:
        """`skipped` are tokens that the text does not show."""
        self._token_text, self._skipped = token_text, skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._num_chars = 0

    def of_next(self, token_id: int) -> int:
        """The place of this token; the one after it follows."""
        place = self._num_chars
        if token_id not in self._skipped:
            self._num_chars += len(self._decode(self._token_text(token_id)[1]))
        return place
