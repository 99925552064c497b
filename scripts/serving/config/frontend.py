"""The `frontend` section, and the `deadlines` it enforces."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Port, Positive, Seconds, Section
from serving.errors import ConfigError

ToolParser = Literal[
    "auto",
    "deepseek_v32",
    "minimax_m2",
    "seed_oss",
    "glm",
    "qwen3_coder",
    "harmony",
    "gemma4",
    "function_gemma",
    "mistral",
    "mistral_v3",
    "deepseek_v3",
    "deepseek_v31",
    "kimi_k2",
    "llama_function_tag",
    "lfm2",
    "llama4_pythonic",
    "olmo3",
    "pythonic",
    "hermes",
    "phi4_mini",
    "granite",
    "nemotron",
    "minimax_m1",
    "cohere",
    "llama3_json",
    "json",
]
ReasoningParser = Literal[
    "auto", "none", "mistral", "seed_oss", "gemma4", "cohere", "kimi_vl", "think"
]


class FrontendConfig(Section, frozen=True):
    """The HTTP server."""

    host: Annotated[str, Meta(description="Address, network or interface to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Meta(description="Port of the OpenAI-compatible API.")] = 8000
    api_keys_file: Annotated[
        str | None,
        Meta(
            description="File with one API key a line. A request without a key from it gets 401. Default: no keys on loopback; elsewhere `run/secrets/api_keys`, created with one key."
        ),
    ] = None
    tls: Annotated[
        bool,
        Meta(
            description="Serve HTTPS, with `tls_cert_file` or with a certificate for `host` that a private authority signs at the first start. Clients then trust `run/secrets/api_authority.pem`."
        ),
    ] = False
    tls_cert_file: Annotated[
        str | None, Meta(description="PEM file with your certificate and its chain.")
    ] = None
    tls_key_file: Annotated[str | None, Meta(description="PEM file with its key.")] = None
    requests_per_minute: Annotated[
        Positive | None, Meta(description="Requests of one API key in a minute; more get 429.")
    ] = None
    max_body_bytes: Annotated[Positive, Meta(description="Larger request bodies get 413.")] = (
        4 * 1024 * 1024
    )
    processes: Annotated[
        Positive,
        Meta(
            description="Processes that share the port. Each has its own router, and they share their routing decisions. Add one when a frontend uses up its core."
        ),
    ] = 1
    max_inflight: Annotated[
        Positive, Meta(description="Requests in flight in each process; more get 429.")
    ] = 512
    tool_parser: Annotated[
        ToolParser,
        Meta(
            description="Format of the model's tool calls. `auto`: decided from its chat template; `/v1/models` names the format and the reason."
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParser,
        Meta(
            description="Format of the model's reasoning. `auto`: decided from its chat template; `none`: reasoning stays in the text."
        ),
    ] = "auto"
    special_tokens_in_text: Annotated[
        bool,
        Meta(
            description="Let special tokens in a message's text act as special tokens. Off: `<|im_end|>` in a message is text and cannot end a turn."
        ),
    ] = False
    guide_bytes: Annotated[
        Positive,
        Meta(
            description="Largest JSON schema, expression or grammar that an answer may have to follow; larger ones get 400."
        ),
    ] = 1024 * 1024
    guide_compile_s: Annotated[
        Seconds,
        Meta(description="CPU time to compile and try it, in a process of its own; then 400."),
    ] = 3.0
    cors_origins: Annotated[
        list[str],
        Meta(
            description="Origins whose pages may call the API from a browser; `*` for all. Pages of this machine (loopback) always may."
        ),
    ] = []
    allowed_hosts: Annotated[
        list[str],
        Meta(
            description="Further host names by which clients reach an API on loopback without keys, such as that of a reverse proxy. Loopback's own always work; other names get 403, because a page of the web could use them."
        ),
    ] = []
    responses_store_bytes: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(
            description="Room for responses that `/v1/responses` keeps for `previous_response_id`, in `run/responses.sqlite`; the oldest go first. 0: none are kept."
        ),
    ] = 256 * 1024 * 1024
    responses_store_s: Annotated[
        Seconds, Meta(description="Time that `/v1/responses` keeps a response.")
    ] = 86_400.0
    drain_s: Annotated[
        Seconds, Meta(description="Time that running requests get when the service stops.")
    ] = 10.0


class DeadlinesConfig(Section, frozen=True):
    """How long each phase of a request may take, in seconds."""

    total_s: Annotated[Seconds, Meta(description="The whole request; then 504.")] = 600.0
    queue_s: Annotated[
        Seconds,
        Meta(
            description="Waiting in a worker's queue until the prompt starts to compute. Then the frontend tries one other worker, and after that answers 503 with `Retry-After`. TensorRT-LLM queues internally; there `prefill_s` covers it."
        ),
    ] = 60.0
    prefill_s: Annotated[
        Seconds, Meta(description="Waiting for and computing the prompt on one worker; then 504.")
    ] = 120.0
    first_token_s: Annotated[
        Seconds,
        Meta(
            description="From reading a request to its first token, over all workers that were tried; then 504."
        ),
    ] = 150.0
    token_s: Annotated[
        Seconds, Meta(description="Gap between two outputs before the worker counts as lost.")
    ] = 30.0


def check_tls(frontend: FrontendConfig) -> None:
    """Raises ConfigError when a certificate comes without its key, or a key alone."""
    if (frontend.tls_cert_file is None) != (frontend.tls_key_file is None):
        missing = "tls_key_file" if frontend.tls_key_file is None else "tls_cert_file"
        raise ConfigError(
            f"frontend.{missing}",
            "a certificate and its key belong together",
            remedy="set both, or neither of them and `frontend.tls`",
        )
