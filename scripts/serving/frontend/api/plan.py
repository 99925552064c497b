"""How an API for completions reads a request, and what it makes of it.

A further API is a module beside `chat.py` and `completions.py` with a `CompletionApi` of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from msgspec import Struct

from serving.frontend.api.errors import ApiError
from serving.frontend.api.writer import ResponseWriter
from serving.frontend.model import LoadedModel
from serving.text.preprocess import PreparedRequest

Body = TypeVar("Body")


class CompletionPlan(Struct, frozen=True):
    """The samples to generate and the way to write the response.

    Choice `i` is `samples[i]`; each run of `samples_per_prompt` choices shares a prompt. `preludes`
    are texts that precede the generated ones (`echo`): one for each sample, or none. `ignored`
    names what the request contains and the answer does not respect; a header repeats it.
    """

    samples: list[PreparedRequest]
    writer: ResponseWriter
    stream: bool
    samples_per_prompt: int = 1
    preludes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


class CompletionApi(Struct, Generic[Body], frozen=True):
    """One API. `name` is its label in the metrics. Request ids begin with `id_prefix`.

    `parse` decodes a body and checks what it can without the model; `prepare` does the rest, for a
    request id. Both raise InvalidRequest. `error_body` writes an error as the API's clients read it.
    """

    name: str
    id_prefix: str
    parse: Callable[[bytes], Body]
    prepare: Callable[[Body, LoadedModel, str], Awaitable[CompletionPlan]]
    error_body: Callable[[ApiError], bytes] = ApiError.body
