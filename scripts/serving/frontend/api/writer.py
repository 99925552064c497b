"""The bytes of a response: what chat and completion responses have in common.

Chunks are assembled from byte templates that are made once per response. Building and encoding a
dict for each chunk would cost half as much again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import orjson
from msgspec import Struct

from serving.frontend.api.errors import ApiError
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

    With `stream_usage`, every chunk has a `usage` field, which is null except in the last one.
    """

    def __init__(self, chunk: Identity, whole: Identity, *, stream_usage: bool) -> None:
        self._stream_usage = stream_usage
        self._chunk_opening = b"data: " + chunk.opening()
        self._chunk_closing = b'],"usage":null}\n\n' if stream_usage else b"]}\n\n"
        self._whole_opening = whole.opening()

    @abstractmethod
    def _chunk_choices(self, index: int, delta: Delta) -> list[bytes]:
        """The choice, as JSON, of each chunk that `delta` becomes."""

    @abstractmethod
    def _choice(self, index: int, delta: Delta) -> bytes:
        """A finished choice as JSON. `delta` is all of its text."""

    def chunks(self, index: int, deltas: Sequence[Delta]) -> bytes:
        opening, closing = self._chunk_opening, self._chunk_closing
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
