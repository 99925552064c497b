"""The library's `DisaggregatedParams` as the plain `state` that travels, and back.

Every field travels, whatever its name in a version: 1.3 added several without which its decode
side fails. Two kinds of value are not plain. Log-probabilities get a tag. Tensors, which come only
on request, stay behind.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

from msgspec import Struct

from serving.engine.trtllm.versions import fields_of
from serving.errors import KvTransferFailed
from serving.protocol import EngineRequest, EngineTransferParams

log = logging.getLogger(__name__)

_LOGPROBS = "$logprobs"
# These fields are set before any KV is committed, so they do not prove that there is any.
_NOT_KV = frozenset({"request_type", "first_gen_tokens", "schedule_style"})


class PrefilledKv(Struct, frozen=True):
    """What `EngineTransferParams.state` holds.

    `params` are the fields of the library's class. The KV is that of the request's first
    `num_tokens` tokens. `stop_token_id`: the prefill's first token ended the request, and the
    decode is only wanted for fetching the KV.
    """

    params: dict[str, Any]
    num_tokens: int
    stop_token_id: int | None = None

    def state(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "num_tokens": self.num_tokens,
            "stop_token_id": self.stop_token_id,
        }


def committed_params(params: Any) -> dict[str, Any] | None:
    """Plain fields of a context's `DisaggregatedParams`, or None when it holds no KV for anyone.

    It holds none when the request ended before its KV was offered, on an end id for example: the
    params are then those that went in.
    """
    if params is None:
        return None
    plain = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is None:
            continue
        try:
            plain[field.name] = _plain(value)
        except TypeError:
            log.debug("%s stays behind: %s cannot travel", field.name, type(value).__name__)
    return plain if plain.keys() - _NOT_KV else None


def read_prefilled_kv(request: EngineRequest) -> PrefilledKv:
    """Raises KvTransferFailed when the request brings nothing that this engine could fetch."""
    params = request.kv_transfer_params
    if not isinstance(params, EngineTransferParams):
        raise KvTransferFailed(request.request_id, "another engine", "it does not move KV itself")
    try:
        kv = PrefilledKv(
            dict(params.state["params"]),
            int(params.state["num_tokens"]),
            params.state.get("stop_token_id"),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise KvTransferFailed(
            request.request_id, params.source_instance, f"its state is damaged: {exc!r}"
        ) from exc
    if not request.num_prompt_tokens <= kv.num_tokens <= len(request.token_ids):
        raise KvTransferFailed(
            request.request_id,
            params.source_instance,
            f"its KV is for {kv.num_tokens} tokens of {len(request.token_ids)}",
        )
    return kv


def generation_params(
    kv: PrefilledKv, request: EngineRequest, kind: Any, logprob: Any
) -> dict[str, Any]:
    """Keyword arguments of `kind`, the library's `DisaggregatedParams`, for `generation_only`.

    `logprob` is its `Logprob` class, None where there is none. Raises KvTransferFailed when the
    prefill's library has a field that this one does not know.
    """
    arguments = dict(kv.params) | {"request_type": "generation_only"}
    if logprob is None:
        arguments = {k: v for k, v in arguments.items() if not _is_tagged(v)}
    known = fields_of(kind)
    if known is not None and (unknown := sorted(arguments.keys() - known)):
        assert isinstance(request.kv_transfer_params, EngineTransferParams), "it was read"
        raise KvTransferFailed(
            request.request_id,
            request.kv_transfer_params.source_instance,
            f"another version of TensorRT-LLM made it: {', '.join(unknown)} is unknown here",
        )
    return {name: _rich(value, logprob) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    """Raises TypeError for what cannot travel."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if value and all(hasattr(item, "logprob") for item in value.values()):
            return {_LOGPROBS: [[int(i), v.logprob, v.rank] for i, v in value.items()]}
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(type(value).__name__)


def _rich(value: Any, logprob: Any) -> Any:
    if isinstance(value, list):
        return [_rich(item, logprob) for item in value]
    if isinstance(value, dict):
        if _LOGPROBS in value:
            return {i: logprob(logprob=p, rank=rank) for i, p, rank in value[_LOGPROBS]}
        return {key: _rich(item, logprob) for key, item in value.items()}
    return value


def _is_tagged(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_tagged(item) for item in value)
    return isinstance(value, dict) and _LOGPROBS in value
