"""`/v1/completions`: its request, and the bytes of its responses."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, cast

import orjson
from msgspec import Meta

from serving.errors import InvalidRequest
from serving.frontend.api.fields import (
    GenerationFields,
    RequestDecoder,
    StreamOptions,
    check_text,
    refuse_unsupported,
    sample_seed,
)
from serving.frontend.api.logprobs import TextPlace, completion_logprobs
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.writer import ChoicesWriter, Identity, json_text, token_ids_field
from serving.frontend.model import LoadedModel
from serving.text.detokenize import Delta
from serving.text.preprocess import PreparedRequest, Preprocessor, SampleGroup
from serving.text.token_text import TokenText

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 128

Prompt = str | list[int]


class CompletionRequest(GenerationFields, kw_only=True):
    """The body. `prompt` is one text, token ids, or a list of either; an empty one, or none, is
    the beginning of a document. With `max_tokens` 0, nothing is generated (`echo` shows the prompt).
    """

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[Prompt]:
        """Raises InvalidRequest for a mixed list."""
        if not self.prompt:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = set(map(type, self.prompt))
        if len(kinds) != 1:
            raise InvalidRequest("`prompt` mixes strings and token ids", param="prompt")
        if kinds == {int}:  # Perhaps a hundred thousand of them: neither checked again nor copied.
            return [cast("list[int]", self.prompt)]
        return [item for item in self.prompt if not isinstance(item, int)]


_decoder = RequestDecoder(CompletionRequest)


def parse(body: bytes) -> CompletionRequest:
    """Everything that can be checked without the model. Raises InvalidRequest."""
    request = _decoder.decode(body)
    num_samples = request.n or 1
    neutral: dict[str, tuple[Any, ...]] = {
        "best_of": (None, num_samples),
        "suffix": (None, ""),
    }
    refuse_unsupported(request, neutral)
    num_choices = len(request.prompts()) * num_samples
    if num_choices > MAX_CHOICES:
        raise InvalidRequest(
            f"The request is for {num_choices} completions; at most {MAX_CHOICES} are possible",
            param="prompt",
        )
    return request


async def prepare(
    request: CompletionRequest, model: LoadedModel, request_id: str
) -> CompletionPlan:
    """Raises InvalidRequest."""
    preprocessor = model.preprocessor
    stop = request.stop_strings()
    guide = await request.checked_guide(model)
    prompts = request.prompts()
    num_samples = request.n or 1
    alone = len(prompts) * num_samples == 1
    samples: list[PreparedRequest] = []
    preludes: list[str] = []
    for prompt in prompts:
        await asyncio.sleep(0)  # Many prompts must not hold up other streams.
        token_ids = await _encode(prompt, preprocessor)
        prompt_only = request.max_tokens == 0
        max_tokens = preprocessor.resolve_max_tokens(
            len(token_ids),
            1 if prompt_only else request.max_tokens,
            default=DEFAULT_MAX_TOKENS,
            param="prompt",
        )
        sampling = request.sampling(
            preprocessor,
            max_tokens=max_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
            guide=guide,
        )
        sample_group = SampleGroup() if num_samples > 1 else None
        for sample in range(num_samples):
            samples.append(
                PreparedRequest(
                    request_id=request_id if alone else f"{request_id}-{len(samples)}",
                    token_ids=token_ids,
                    sampling=sample_seed(sampling, sample),
                    stop=stop,
                    skip_special_tokens=request.skip_special_tokens is not False,
                    session=request.user,
                    prompt_only=prompt_only,
                    include_stop=request.include_stop_str_in_output is True,
                    return_token_ids=request.return_token_ids is True,
                    sample_group=sample_group,
                )
            )
            if request.echo:
                preludes.append(prompt if isinstance(prompt, str) else preprocessor.decode(prompt))
    identity = Identity.new(
        request_id, "text_completion", request.model, model.card.engine_fingerprint
    )
    shows_special = request.echo or request.skip_special_tokens is False
    writer = CompletionWriter(
        identity,
        stream_options=request.stream_options,
        token_text=model.token_text if request.logprobs is not None else None,
        skipped=frozenset() if shows_special else model.token_text.special_ids,
    )
    return CompletionPlan(
        samples=samples,
        writer=writer,
        stream=bool(request.stream),
        samples_per_prompt=num_samples,
        preludes=tuple(preludes),
    )


async def _encode(prompt: Prompt, preprocessor: Preprocessor) -> list[int]:
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        token_ids = await preprocessor.encode_text(prompt)
    else:
        preprocessor.check_token_ids(prompt)
        token_ids = prompt
    return token_ids or [preprocessor.document_start_id]


class CompletionWriter(ChoicesWriter):
    """Chunks and the whole have the same shape."""

    def __init__(
        self,
        identity: Identity,
        *,
        stream_options: StreamOptions | None,
        token_text: TokenText | None,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        """`skipped` are tokens that the text does not show."""
        super().__init__(identity, identity, stream_options)
        self._token_text, self._skipped = token_text, skipped
        self._places: dict[int, TextPlace] = {}

    def _chunk_choices(self, index: int, delta: Delta) -> list[bytes]:
        return [self._choice(index, delta)]

    def _choice(self, index: int, delta: Delta) -> bytes:
        finish_reason = b'"%b"' % delta.finish_reason.encode() if delta.finish_reason else b"null"
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}' % (
            index,
            json_text(delta.text),
            self._logprobs(index, delta),
            finish_reason,
            token_ids_field(delta),
        )

    def _logprobs(self, index: int, delta: Delta) -> bytes:
        if self._token_text is None:
            return b"null"
        if index not in self._places:
            self._places[index] = TextPlace(self._token_text, self._skipped)
        entries = delta.logprobs or ()
        return orjson.dumps(completion_logprobs(entries, self._token_text, self._places[index]))


API = CompletionApi("completions", "cmpl-", parse, prepare)
