"""The bytes of a response: what chat and completion responses have in common.

Chunks are assembled from byte templates that are made once per response. Building and encoding a
dict for each chunk would cost half as much again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from msgspec import Struct

from serving.frontend.api.errors import ApiError
from serving.frontend.api.fields import StreamOptions
from serving.text.detokenize import Delta

DONE = b"data: [DONE]\n\n"


class Usage(Struct):
    """Token counts of a whole response. `cached_tokens` are part of `prompt_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def json(self) -> bytes:
        return (
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":%d},'
            b'"completion_tokens_details":{"reasoning_tokens":%d}}'
        ) % (
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
        )


class Identity(Struct, frozen=True):
    """What each chunk of a response repeats. `created` is Unix time in seconds."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, request_id: str, object: str, model: str, engine_fingerprint: str) -> Identity:
        return cls(request_id, object, int(time.time()), model, f"fp_{engine_fingerprint[:12]}")

    def opening(self) -> bytes:
        """The JSON object up to and including `"choices":[`."""
        return (
            b'{"id":%b,"object":%b,"created":%d,"model":%b,"system_fingerprint":%b,"choices":['
        ) % (
            orjson.dumps(self.id),
            orjson.dumps(self.object),
            self.created,
            orjson.dumps(self.model),
            orjson.dumps(self.system_fingerprint),
        )


class ResponseWriter(ABC):
    """Writes one response in the format of one API: the events of a stream, or the whole body."""

    def follow(self, usage: Callable[[], Usage]) -> None:
        """Called once, before anything is written, with a way to see the usage so far."""
        del usage

    def opening(self) -> bytes:
        """The events that precede the first delta."""
        return b""

    @abstractmethod
    def chunks(self, index: int, deltas: Sequence[Delta]) -> bytes:
        """The events of `deltas` of choice `index`."""

    @abstractmethod
    def closing(self, usage: Usage) -> bytes:
        """The events that end a complete stream."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream with an error. No client may take it for complete."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """The body of a response that is not streamed. Each delta is all of a choice."""


class ChoicesWriter(ResponseWriter):
    """Writes chat completions and completions, which consist of choices.

    If the stream options ask for usage, every chunk has a `usage` field. It is null except in the
    last chunk, or the usage so far if the options ask for that.
    """

    def __init__(
        self, chunk: Identity, whole: Identity, stream_options: StreamOptions | None
    ) -> None:
        options = stream_options or StreamOptions()
        stream_usage = self._stream_usage = options.include_usage is True
        self._is_continuous = stream_usage and options.continuous_usage_stats is True
        self._usage: Callable[[], Usage] | None = None
        self._chunk_opening = b"data: " + chunk.opening()
        self._chunk_closing = b'],"usage":null}\n\n' if stream_usage else b"]}\n\n"
        self._whole_opening = whole.opening()

    def follow(self, usage: Callable[[], Usage]) -> None:
        if self._is_continuous:
            self._usage = usage

    @abstractmethod
    def _chunk_choices(self, index: int, delta: Delta) -> list[bytes]:
        """The choice, as JSON, of each chunk that `delta` becomes."""

    @abstractmethod
    def _choice(self, index: int, delta: Delta) -> bytes:
        """A finished choice as JSON. `delta` is all of its text."""

    def chunks(self, index: int, deltas: Sequence[Delta]) -> bytes:
        opening, closing = self._chunk_opening, self._chunk_closing
        if self._usage is not None:
            closing = b'],"usage":' + self._usage().json() + b"}\n\n"
        between = closing + opening
        choices = [choice for delta in deltas for choice in self._chunk_choices(index, delta)]
        return opening + between.join(choices) + closing

    def closing(self, usage: Usage) -> bytes:
        if not self._stream_usage:
            return DONE
        return self._chunk_opening + b'],"usage":' + usage.json() + b"}\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        choices = b",".join(self._choice(index, delta) for index, delta in enumerate(deltas))
        return self._whole_opening + choices + b'],"usage":' + usage.json() + b"}"


def json_text(text: str) -> bytes:
    """A JSON string. Line separators are escaped: some clients split events at them."""
    encoded = orjson.dumps(text)
    if text.isascii():
        return encoded
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded


_LINE_ENDS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\x85".encode(), b"\\u0085"),
)


def json_event(content: Any) -> bytes:
    """A JSON value for an event, with line separators escaped like `json_text`."""
    encoded = orjson.dumps(content)
    for raw, escaped in _LINE_ENDS:
        if raw in encoded:
            encoded = encoded.replace(raw, escaped)
    return encoded


def token_ids_field(delta: Delta) -> bytes:
    """A field for a choice, if the request asks for token ids."""
    return b"" if delta.token_ids is None else b',"token_ids":' + orjson.dumps(delta.token_ids)
