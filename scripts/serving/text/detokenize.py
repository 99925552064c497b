"""Token ids to text, as they arrive: whole characters only, and no part of a stop string.

Text is held back in two cases: while its last character is incomplete, and while its end could be
the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from serving.protocol import EngineOutput, FinishReason, TokenLogprob
from serving.text.parts import Part, Text
from serving.text.preprocess import PreparedRequest
from serving.text.token_text import TokenText, token_decoder


class Delta(Struct):
    """What is new of one sequence. `finish_reason` set means: the last one.

    `parts` replace `text` where the answer is parsed. `stop_string` is the one that ended it.
    """

    text: str = ""
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    logprobs: list[TokenLogprob] | None = None
    parts: list[Part] | None = None
    stop_string: str | None = None
    token_ids: list[int] | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.finish_reason or self.parts)

    def as_parts(self) -> Sequence[Part]:
        """The parts; text that was not parsed is one."""
        if self.parts is not None:
            return self.parts
        return [Text(self.text)] if self.text else []

    @classmethod
    def merged(cls, deltas: Sequence[Delta]) -> Delta:
        """One delta with the content of all `deltas`, in order."""
        if len(deltas) == 1:
            return deltas[0]
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        text = "".join([delta.text for delta in deltas])
        parts = None
        if any(delta.parts is not None for delta in deltas):
            parts = [part for delta in deltas for part in delta.as_parts()]
        last = deltas[-1]
        token_ids = None
        if any(delta.token_ids is not None for delta in deltas):
            token_ids = [token_id for delta in deltas for token_id in delta.token_ids or ()]
        return cls(text, last.finish_reason, logprobs or None, parts, last.stop_string, token_ids)


class Detokenizer:
    """The text of one sample. Once `finish_reason` is set, perhaps by a stop string, it is over."""

    def __init__(self, tokens: TokenText, prepared: PreparedRequest) -> None:
        self._decoder = token_decoder(
            tokens,
            prepared.token_ids,
            skip_special_tokens=prepared.skip_special_tokens,
            kept=prepared.answer.kept_special_tokens if prepared.answer is not None else (),
        )
        self._stops, self._include_stop = prepared.stop, prepared.include_stop
        self._min_tokens = prepared.sampling.min_tokens
        self._held = ""
        self._released_chars = 0
        # (where its text begins, logprob) of tokens whose text is still held back
        self._held_logprobs: list[tuple[int, TokenLogprob]] = []
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._stop_string: str | None = None

    def feed_each(self, output: EngineOutput) -> list[Delta]:
        """One delta for each token of `output` that releases text."""
        if self._stops or output.logprobs is not None or self._held_logprobs:
            return [delta for piece in _by_token(output) if (delta := self.feed(piece))]
        step = self._decoder.step
        deltas = [Delta(text) for token_id in output.token_ids if (text := step(token_id))]
        self.num_tokens += len(output.token_ids)
        self._released_chars += sum([len(delta.text) for delta in deltas])
        if output.finish_reason is not None:
            tail = self._decoder.flush()
            self._released_chars += len(tail)
            self.finish_reason = output.finish_reason
            last = deltas.pop().text if deltas else ""
            deltas.append(Delta(last + tail, output.finish_reason))
        return deltas

    def feed(self, output: EngineOutput) -> Delta:
        """All text that `output` releases, perhaps none, as one delta."""
        if self.finish_reason is not None:
            return Delta()  # A stop string ended it; these tokens came with it.
        parts = []
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if output.logprobs is not None:
                start = self._released_chars + len(self._held)
                self._held_logprobs.append((start, output.logprobs[position]))
            text = self._decoder.step(token_id)
            if text:
                parts.append(self._release(text))
                if self.finish_reason is not None:
                    return self._delta(parts)
        if output.finish_reason is not None:
            tail = self._decoder.flush()
            if tail:
                parts.append(self._release(tail))
            if self.finish_reason is None:  # The tail has no stop string either.
                parts.append(self._held)
                self._released_chars += len(self._held)
                self._held = ""
                self.finish_reason = output.finish_reason
        return self._delta(parts)

    def _release(self, text: str) -> str:
        """The text that can be shown after `text` is added. A stop string sets `finish_reason`."""
        if not self._stops or self.num_tokens <= self._min_tokens:
            self._released_chars += len(text)
            return text
        text = self._held + text
        end = _first_stop(text, self._stops)
        if end is None:
            end = len(text) - _held_chars(text, self._stops)
            self._held = text[end:]
        else:
            self._held = ""
            self.finish_reason = "stop"
            self._stop_string = next(stop for stop in self._stops if text.startswith(stop, end))
            if self._include_stop:
                end += len(self._stop_string)
        self._released_chars += end
        return text[:end]

    def _delta(self, parts: list[str]) -> Delta:
        text = "".join(parts)
        return Delta(text, self.finish_reason, self._take_logprobs(), stop_string=self._stop_string)

    def _take_logprobs(self) -> list[TokenLogprob] | None:
        """Those whose text begins in the released text. At a natural end, all of them."""
        held = self._held_logprobs
        if not held:
            return None
        count = len(held)
        if self._held or self.finish_reason == "stop":
            while count and held[count - 1][0] >= self._released_chars:
                count -= 1
        self._held_logprobs = held[count:]
        return [entry for _, entry in held[:count]] or None


def _by_token(output: EngineOutput) -> list[EngineOutput]:
    """One output for each token. The last one has the finish_reason."""
    ids, logprobs = output.token_ids, output.logprobs
    if len(ids) < 2:
        return [output]
    last = len(ids) - 1
    return [
        EngineOutput(
            output.request_id,
            [token_id],
            output.finish_reason if position == last else None,
            logprobs=None if logprobs is None else [logprobs[position]],
        )
        for position, token_id in enumerate(ids)
    ]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The start of the stop string that is complete first."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _held_chars(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        start = max(0, len(text) - len(stop) + 1)
        while (start := text.find(stop[0], start)) >= 0:
            if stop.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest
