"""`DisaggregatedParams` as plain state and back, over msgpack as it travels."""

import dataclasses
from enum import IntEnum
from typing import Any

import msgspec
import pytest
from serving.engine.trtllm.requests.prefilled_kv import (
    PrefilledKv,
    committed_params,
    generation_params,
    read_prefilled_kv,
)
from serving.errors import KvTransferFailed
from serving.protocol import (
    EngineRequest,
    EngineTransferParams,
    KvTransferParams,
    SamplingParams,
    TransferParams,
)


class Style(IntEnum):
    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclasses.dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Params:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_log_probs: list[Any] | None = None
    first_gen_logits: Any = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    schedule_style: Style | None = None
    some_later_field: Any = None


@dataclasses.dataclass(slots=True, kw_only=True)
class OlderParams:
    request_type: str | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None


FULL = Params(
    request_type="context_only",
    first_gen_tokens=[9],
    first_gen_log_probs=[[{9: Logprob(-0.5, 1), 4: Logprob(-1.5, 2)}]],
    ctx_request_id=2**63 + 5,
    opaque_state=b"\x00\xff",
    schedule_style=Style.GENERATION_FIRST,
    some_later_field={"endpoint": "tcp://127.0.0.1:1", "ranks": [0, 1]},
)


def request(params: TransferParams | None, num_tokens: int = 5) -> EngineRequest:
    return EngineRequest(
        "r", [1] * num_tokens, 4, SamplingParams(8), "decode", kv_transfer_params=params
    )


def travel(handover: PrefilledKv) -> EngineRequest:
    sent = request(EngineTransferParams("prefill-0", 0, "r", handover.state()))
    return msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=EngineRequest)


def test_every_field_arrives_as_it_left() -> None:
    params = committed_params(FULL)
    assert params is not None
    received = travel(PrefilledKv(params, 4))
    handover = read_prefilled_kv(received)
    assert (handover.num_tokens, handover.stop_token_id) == (4, None)
    arrived = Params(**generation_params(handover, received, Params, Logprob))
    assert arrived == dataclasses.replace(FULL, request_type="generation_only")


def test_log_probabilities_are_left_out_where_no_class_takes_them() -> None:
    params = committed_params(FULL)
    assert params is not None
    received = travel(PrefilledKv(params, 4))
    arguments = generation_params(read_prefilled_kv(received), received, Params, None)
    assert "first_gen_log_probs" not in arguments
    assert arguments["opaque_state"] == b"\x00\xff"


def test_tensors_stay_behind() -> None:
    class Tensor: ...

    params = committed_params(dataclasses.replace(FULL, first_gen_logits=[Tensor()]))
    assert params is not None
    assert "first_gen_logits" not in params
    assert "opaque_state" in params


@pytest.mark.parametrize(
    "params",
    [
        None,
        Params(request_type="context_only"),
        Params(request_type="context_only", first_gen_tokens=[9], schedule_style=Style(0)),
    ],
)
def test_params_without_any_kv_are_no_offer(params: Params | None) -> None:
    assert committed_params(params) is None


def test_field_that_this_version_lacks_is_a_failed_transfer_by_name() -> None:
    received = travel(PrefilledKv({"ctx_request_id": 1, "some_later_field": 2}, 4))
    with pytest.raises(KvTransferFailed, match="some_later_field"):
        generation_params(read_prefilled_kv(received), received, OlderParams, Logprob)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"params": {}},
        {"params": 3, "num_tokens": 4},
        {"params": {}, "num_tokens": "many"},
        {"params": {}, "num_tokens": 6},
        {"params": {}, "num_tokens": 3},
    ],
)
def test_damaged_state_is_a_failed_transfer(state: dict[str, Any]) -> None:
    with pytest.raises(KvTransferFailed, match="prefill-0"):
        read_prefilled_kv(request(EngineTransferParams("prefill-0", 0, "r", state)))


def test_another_engines_kv_is_a_failed_transfer() -> None:
    blocks = KvTransferParams("prefill-0", 0, "tcp://127.0.0.1:1", "r", "n", 4, 1, "layout")
    with pytest.raises(KvTransferFailed):
        read_prefilled_kv(request(blocks))
