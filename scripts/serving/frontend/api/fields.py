"""The fields that chat and completion requests share: their ranges and their meaning.

Types and ranges are checked by msgspec while the JSON is decoded. A known
field that would change the answer in a way this server cannot is refused.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.guides import GuideFields
from serving.frontend.model import LoadedModel
from serving.protocol import Guide, SamplingParams
from serving.text.preprocess import Preprocessor

log = logging.getLogger("serving.frontend")

INT32_MAX = 2**31 - 1
GREEDY_BELOW = 1e-4
"""Logits divided by a smaller temperature overflow. Such sampling is greedy anyway."""

Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=512)]
Tokens = Annotated[int, Meta(ge=0, le=INT32_MAX)]

Request = TypeVar("Request", bound=Struct)


class StreamOptions(Struct):
    """`include_obfuscation` is accepted: there is none."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationFields(GuideFields, kw_only=True):
    """As in OpenAI's specification, where null means the default; then the usual extensions."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[StopString] | None = None
    user: str | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0, le=INT32_MAX)]], Meta(max_length=64)] | None
    ) = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """Raises InvalidRequest for more than 16."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or not all(stops):
            raise InvalidRequest("`stop` takes up to 16 strings, none of them empty", param="stop")
        for stop in stops:
            check_text(stop, "stop")
        return tuple(stops)

    async def checked_guide(self, model: LoadedModel) -> Guide | None:
        """The form that constrains the answer. Raises InvalidRequest if it does not compile."""
        named = self.guide()
        if named is None:
            return None
        await model.check_guide(named.guide, named.param)
        return named.guide

    def sampling(
        self,
        preprocessor: Preprocessor,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        guide: Guide | None = None,
    ) -> SamplingParams:
        """Raises InvalidRequest if `min_tokens` exceeds `max_tokens`, and for unknown tokens."""
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(
                f"`min_tokens` is {min_tokens}, but `max_tokens` allows only {max_tokens}",
                param="min_tokens",
            )
        temperature = _default(self.temperature, 1.0)
        eos = () if self.ignore_eos else preprocessor.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=0.0 if temperature < GREEDY_BELOW or self.top_p == 0 else temperature,
            top_p=_default(self.top_p, 1.0) or 1.0,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            seed=self.seed,
            stop_token_ids=(*eos, *(self.stop_token_ids or ())),
            logit_bias=self._biases(preprocessor),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            guide=guide,
        )

    def _biases(self, preprocessor: Preprocessor) -> tuple[tuple[int, float], ...]:
        biases: dict[int, float] = {}
        for key, bias in (self.logit_bias or {}).items():
            # Digits only: `int` also takes signs, spaces and digits of other scripts.
            # Longer numbers are no ids either, and cost time to read.
            is_number = key.isascii() and key.isdigit() and len(key) <= 12
            if not (is_number and int(key) < preprocessor.vocab_size):
                raise InvalidRequest(
                    f"`logit_bias` maps token ids to biases; {key[:40]!r} is not a token id from 0 "
                    f"to {preprocessor.vocab_size - 1}",
                    param="logit_bias",
                )
            biases[int(key)] = bias
        return tuple(biases.items())


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def sample_seed(sampling: SamplingParams, sample: int) -> SamplingParams:
    """Give each further sample of a prompt its own seed. Otherwise all would be equal."""
    if sampling.seed is None or sample == 0:
        return sampling
    seed = (sampling.seed + sample + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)


def check_text(text: str, param: str) -> None:
    """Raises InvalidRequest for NUL: C tokenizers would cut the text there."""
    if "\0" in text:
        raise InvalidRequest("The text contains a NUL character", param=param)


def refuse_unsupported(request: Struct, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidRequest for a field with a value other than its `neutral` ones."""
    for name, values in neutral.items():
        if getattr(request, name) not in values:
            raise InvalidRequest(
                f"`{name}` is not supported by this server",
                param=name,
                code="unsupported_parameter",
            )


# --- decoding ----------------------------------------------------------------------------------

_WITH_PATH = re.compile(
    r"^(?P<what>.*?)(?: - at `(?P<key>key in )?\$\.?(?P<path>.*?)`)?$", re.DOTALL
)
_UNKNOWN = re.compile(r"unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>.*)`", re.DOTALL)


class RequestDecoder(Generic[Request]):
    """Decodes bodies of one type.

    Unknown fields are dropped, counted and logged once for each name: clients send fields of their
    own, and a request that means what it says without them is served.
    """

    def __init__(self, type: type[Request]) -> None:
        # In one pass for bodies without unknown fields, which are most.
        self._known_only: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
            msgspec.defstruct(
                type.__name__, [], bases=(type,), kw_only=True, forbid_unknown_fields=True
            )
        )
        self._strict = msgspec.json.Decoder(type)
        # Takes `1.0` for an integer, as JSON Schema does.
        self._lax = msgspec.json.Decoder(type, strict=False)
        self._known = frozenset(field.encode_name for field in msgspec.structs.fields(type))

    def decode(self, body: bytes) -> Request:
        """Raises InvalidRequest that names the field."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            known: Request = self._known_only.decode(body)
            return known
        request = _decoded(self._strict, body, self._lax)
        unknown = _top_level.decode(body).keys() - self._known
        for name in unknown:
            ignored_fields.note(name)
        return request


class IgnoredFields:
    """Names of request fields that were dropped, with how often. Bounded."""

    MAX_NAMES = 200

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def note(self, name: str) -> None:
        name = name[:60]
        if name not in self.counts:
            if len(self.counts) >= self.MAX_NAMES:
                return
            log.info("requests have the unknown field %r, which is ignored", name)
        self.counts[name] = self.counts.get(name, 0) + 1


ignored_fields = IgnoredFields()
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])
Value = TypeVar("Value")


def decode_field(decoder: msgspec.json.Decoder[Value], text: msgspec.Raw, name: str) -> Value:
    """The value of a field that the request's type left undecoded. Raises InvalidRequest."""
    return _decoded(decoder, text, None, name)


def _decoded(
    strict: msgspec.json.Decoder[Value],
    text: bytes | msgspec.Raw,
    lax: msgspec.json.Decoder[Value] | None,
    field: str = "",
) -> Value:
    """`field` is the one that `text` belongs to; empty for the whole body."""
    try:
        try:
            return strict.decode(text)
        except msgspec.ValidationError as exc:
            if lax is None or "got `float`" not in str(exc):
                raise
            return lax.decode(text)
    except msgspec.ValidationError as exc:
        raise _explain(str(exc), field) from None
    except UnicodeDecodeError:
        raise InvalidRequest("The request body is not valid UTF-8", code="invalid_json") from None
    except msgspec.DecodeError as exc:
        raise InvalidRequest(
            f"The request body is not valid JSON: {exc}", code="invalid_json"
        ) from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply", code="invalid_json") from None


def _explain(message: str, field: str) -> InvalidRequest:
    match = _WITH_PATH.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    path = field + path
    if unknown := _UNKNOWN.search(what):
        name = _join(path, unknown["name"])
        return InvalidRequest(
            f"Unrecognized request argument: {name}", param=name, code="unknown_parameter"
        )
    if missing := _MISSING.search(what):
        name = _join(path, missing["name"])
        return InvalidRequest(
            f"`{name}` is required", param=name, code="missing_required_parameter"
        )
    what = what[:1].lower() + what[1:]
    where = f"`{path}`: " if path else "The request body: "
    return InvalidRequest(f"{where}{what}", param=path or None, code="invalid_value")


def _join(path: str, name: str) -> str:
    return f"{path}.{name[:100]}" if path else name[:100]
