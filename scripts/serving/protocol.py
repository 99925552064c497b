"""Every message that crosses a process boundary. `load_report.py` has the load report.

Encoding is msgpack through msgspec, except discovery values (JSON, so that `etcdctl get` is
readable). Structs are `array_like` where they travel once per engine step.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from serving.errors import InvalidRequest, Overloaded, ServingError
from serving.load_report import LoadReport

Role = Literal["agg", "prefill", "decode"]
Phase = Literal["agg", "prefill", "decode"]
Pooling = Literal["last", "mean"]
"""Which hidden states make an embedding: the last token's, or the mean of all."""
FinishReason = Literal["stop", "length", "cancelled", "error"]
Tier = Literal["device", "host"]
"""Where a KV block lies: in the engine's pool, or in host memory, from which it is copied back."""

PROTOCOL_VERSION = 2


# --- requests and tokens (the direct connection, `rpc/`) ----------------------------------------


class Guide(Struct, frozen=True):
    """A constraint on the output, which must match it as a whole. `text` is a JSON schema, a
    regular expression (Rust's syntax), a grammar (Lark's syntax, in llguidance's dialect, or EBNF
    with `::=`) or a structural tag (JSON, see `grammar/structural_tags.py`)."""

    kind: Literal["json_schema", "regex", "grammar", "structural_tag"]
    text: str


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. Names and meanings are OpenAI's, plus the common extensions.

    `temperature == 0` is greedy. `logprobs` is the number of alternatives to report beside the
    chosen token (0: only the chosen one; None: none at all), and `prompt_logprobs` the same for
    the prompt's tokens. Stop strings never reach a worker: the frontend's detokenizer finds them
    and aborts.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # includes the model's EOS unless `ignore_eos`
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), no id twice
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None


class KvTransferParams(Struct, frozen=True, tag="blocks"):
    """What a decode worker needs to fetch the KV that a prefill worker holds for it.

    `nonce` is unguessable and valid for this request only. `address` is the transport's own
    (`ucx://127.0.0.1:41233`). `layout` is `KvLayout.fingerprint`: bytes of another layout are refused.
    """

    source_instance: str
    source_epoch: int
    address: str
    request_id: str
    nonce: str
    num_tokens: int
    num_blocks: int
    layout: str


class EngineTransferParams(Struct, frozen=True, tag="engine"):
    """The same for an engine that moves KV by itself. Only the engine reads `state`.

    The prefill engine frees its blocks only when a decode engine has fetched them or when its own
    timeout ends. So a decode must follow these parameters, even when its caller has gone.
    """

    source_instance: str
    source_epoch: int
    request_id: str
    state: dict[str, Any]


TransferParams = KvTransferParams | EngineTransferParams


class EngineRequest(Struct, frozen=True, omit_defaults=True):
    """One request as a worker sees it.

    `token_ids[:num_prompt_tokens]` is the prompt. Tokens after it were generated before (the
    request continues after a failure of another worker, or goes from prefill to decode); they
    count as output for penalties, seeds and `max_tokens`. `deadline_s` is the time left, in
    seconds, when the message was sent. An engine that has not begun the request after `queue_s`
    seconds in its queue refuses it with QueuedTooLong; None: it waits.

    Phase `agg`: prefill and decode here. `prefill`: compute the prompt, sample one token, hold
    the KV for a decode worker. `decode`: fetch the KV described by `kv_transfer_params`, go on.
    With `follows_prefill` the prefill is still running: `token_ids` lacks the token that it will
    sample, which comes with the KV.

    With `pooling` nothing is generated (`max_tokens` is 1, the phase `agg`): the one output has the
    pooled hidden states of the prompt.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    phase: Phase = "agg"
    kv_transfer_params: TransferParams | None = None
    deadline_s: float = 600.0
    follows_prefill: bool = False
    queue_s: float | None = None
    pooling: Pooling | None = None


class TokenLogprob(Struct, frozen=True, array_like=True):
    """`logprob` of `token_id`, and the `top` alternatives as (token_id, logprob), best first.

    `logprob` is None for the first token of a prompt, since no token comes before it.
    """

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


class ErrorInfo(Struct, frozen=True, array_like=True):
    """An error that travels: `kind` is the class name in `errors.py`, whose fields the rest are."""

    kind: str
    message: str
    retry_after_s: float = 1.0
    param: str | None = None
    code: str | None = None

    @classmethod
    def from_error(cls, exc: ServingError) -> ErrorInfo:
        """The form in which an error travels to a frontend."""
        retry_after_s = exc.retry_after_s if isinstance(exc, Overloaded) else 1.0
        param, code = (exc.param, exc.code) if isinstance(exc, InvalidRequest) else (None, None)
        return cls(type(exc).__name__, str(exc), retry_after_s, param, code)


class EngineOutput(Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one engine step produced for one request. The last output has a `finish_reason`.

    `cached_tokens` (prompt tokens not computed because their KV was cached or fetched) comes with
    the first output only. So do `prompt_logprobs`, for all prompt tokens but the first. An output
    with `kv_transfer_params` and neither tokens nor finish_reason: the prefill's KV can be fetched
    from now on. `stop_token_id` is the token that ended the request; it is not in `token_ids`.
    `embedding` answers a request with `pooling`: float32 numbers, little-endian.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprob] | None = None
    kv_transfer_params: TransferParams | None = None
    error: ErrorInfo | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    embedding: bytes | None = None


class Generate(Struct, frozen=True, tag="generate"):
    request: EngineRequest


class Abort(Struct, frozen=True, tag="abort"):
    request_id: str


class ReleaseKv(Struct, frozen=True, tag="release"):
    """The KV that a finished prefill holds will never be fetched."""

    request_id: str


class Ping(Struct, frozen=True, tag="ping"):
    """The frontend asks whether the worker still computes."""


class Pong(Struct, frozen=True, tag="pong"):
    """The answer to a ping, from the event loop that serves the requests. `late_s`: by how many
    seconds the engine's step outlasts what such a step may take."""

    late_s: float = 0.0


class Hello(Struct, frozen=True, tag="hello"):
    """First message in both directions: both sides check the version, the frontend the epoch.

    `nonce` is fresh, `proof` the worker's (`rpc/handshake.py`); empty where there is no secret.
    `pings`: the worker answers pings, which older ones do not know.
    """

    version: int
    instance_id: str = ""
    epoch: int = 0
    nonce: bytes = b""
    proof: bytes = b""
    pings: bool = False


class Proof(Struct, frozen=True, tag="proof"):
    """The frontend knows the secret; second message to a worker that has one."""

    proof: bytes


class Step(Struct, frozen=True, tag="step"):
    """All outputs of one engine step for the streams of one frontend."""

    outputs: list[EngineOutput]


class Draining(Struct, frozen=True, tag="draining"):
    """The worker accepts no more requests; running ones are finished."""


ToWorker = Hello | Proof | Generate | Abort | ReleaseKv | Ping
ToFrontend = Hello | Step | Draining | Pong


# --- discovery (etcd, `discovery/`) ------------------------------------------------------------


class TextOf(Struct, frozen=True):
    """The multimodal model whose language model alone is served, and its modules left out."""

    architecture: str
    left_out: list[str]


class ModelCard(Struct, frozen=True):
    """What a frontend needs to serve a model; equal for all instances of a deployment."""

    name: str
    tokenizer_dir: str
    max_model_len: int
    block_size: int
    hash_salt: str
    engine_fingerprint: str
    created: int
    dummy_weights: bool = False
    text_of: TextOf | None = None


class InstanceInfo(Struct, frozen=True):
    """One registered worker. The key is `/{namespace}/instances/{instance_id}`.

    `epoch` is fresh per registration and grows; events and connections of an older epoch are
    fenced. Frontends try `rpc_addresses` in order
    (`unix:run/x.sock`, `tcp://127.0.0.1:40001`). `kv_by_engine`: the engine moves KV itself, and
    connects with the first request of each prefill-decode pair.
    """

    instance_id: str
    epoch: int
    role: Role
    rpc_addresses: list[str]
    kv_address: str
    model: ModelCard
    num_blocks: int
    max_batch_size: int
    pid: int
    host: str
    kv_by_engine: bool = False


# --- KV events and load (NATS, `events/`) ------------------------------------------------------


class BlocksStored(Struct, frozen=True, tag="stored", array_like=True, omit_defaults=True):
    """`block_hashes` are chained: the first one's parent is `parent_hash` (None: the root).

    A block is stored in the `host` tier while the device still holds it, and may be in both.
    """

    parent_hash: int | None
    block_hashes: list[int]
    tier: Tier = "device"


class BlocksRemoved(Struct, frozen=True, tag="removed", array_like=True, omit_defaults=True):
    """Removed from this tier; the other tier may still hold them."""

    block_hashes: list[int]
    tier: Tier = "device"


class BlocksCleared(Struct, frozen=True, tag="cleared", array_like=True):
    """Both tiers are empty now."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


class KvEventBatch(Struct, frozen=True, array_like=True):
    """Published once per engine step that changed the cache, with the load after it; one message
    instead of two. `seq` starts at 1 in each epoch and has no gaps."""

    instance_id: str
    epoch: int
    seq: int
    events: list[KvEvent]
    load: LoadReport | None = None


class KvSnapshotPart(Struct, frozen=True, array_like=True, omit_defaults=True):
    """A piece of the reply to a snapshot request: all block hashes held as of `seq`, by tier."""

    instance_id: str
    epoch: int
    seq: int
    part: int
    num_parts: int
    block_hashes: list[int]
    host_hashes: list[int] = []


msgpack_encode = msgspec.msgpack.encode
