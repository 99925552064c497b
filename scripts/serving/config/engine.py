"""The `engine` section, and the two that belong to one engine each: `tensorrt_llm` and `mock`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from serving.config.base import NotNegative, Positive, Section
from serving.errors import ConfigError
from serving.protocol import Role

Weights = Literal["real", "dummy"]


class EngineConfig(Section, frozen=True):
    """The engine that runs the model, and its sizes."""

    backend: Annotated[
        Literal["torch", "tensorrt_llm", "mock"],
        Meta(
            description="`torch` is embedded and runs anywhere. `tensorrt_llm` needs NVIDIA GPUs. `mock` computes nothing and takes the time that the `mock` section sets."
        ),
    ] = "torch"
    flow: Annotated[
        Literal["auto", "pytorch", "trtllm-build"],
        Meta(
            description="How TensorRT-LLM gets its engine. `auto`: `pytorch`, which has no build step. `trtllm-build` exists up to version 1.2."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="`auto`: CUDA when there is a GPU.")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"],
        Meta(
            description="Type of the weights, and of KV unless `kv_cache_dtype` sets another. `auto`: float32 on CPU, bfloat16 on CUDA. `int8`: on CPU only, for weights; everything else is float32."
        ),
    ] = "auto"
    weights: Annotated[
        Weights,
        Meta(
            description="`dummy`: random weights, for load tests of a model whose weights are not at hand. `config.json` and a tokenizer are enough, and answers are noise."
        ),
    ] = "real"
    max_model_len: Annotated[
        Positive | Literal["auto"],
        Meta(
            description="Longest prompt plus completion, in tokens. `auto`: the model's own limit, or what a worker's KV pool holds, if that is less."
        ),
    ] = "auto"
    block_size: Annotated[
        Literal[8, 16, 32, 64, 128], Meta(description="Tokens in a KV block.")
    ] = 16
    kv_cache_tokens: Annotated[
        Positive | None,
        Meta(
            description="Size of each worker's KV pool, in tokens. Default: `max_batch_size` requests of `max_model_len`, if the memory allows that. On CPU, the workers of a machine share half of its free memory (or of its cgroup's), and a pool takes memory as it fills; on CUDA see `gpu_memory_fraction`."
        ),
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "bfloat16", "float8_e4m3fn"],
        Meta(
            description="Type of KV in the torch engine. `auto`: the type of the weights. `float8_e4m3fn` needs a quarter of float32's memory and keeps 3 bits of mantissa; models with latent attention (MLA) refuse it."
        ),
    ] = "auto"
    host_cache_bytes: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(
            description="Host memory of each worker that keeps evicted KV blocks. 0: evicted blocks are lost."
        ),
    ] = 0
    gpu_memory_fraction: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(
            description="Share of a GPU's memory that a torch worker may use. The KV pool gets what weights and steps leave of it."
        ),
    ] = 0.9
    max_batch_size: Annotated[
        Positive, Meta(description="Requests that one worker computes at the same time.")
    ] = 16
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(
            description="Tokens in one engine step; longer prompts are prefilled in chunks. A lower value keeps the decode steps beside a prefill faster. Default: 512 on CPU; on CUDA 2048, or 8192 for prefill workers; 8192 for TensorRT-LLM."
        ),
    ] = None
    max_waiting: Annotated[
        Positive, Meta(description="Requests that may queue in one worker; more get 503.")
    ] = 256
    num_threads: Annotated[
        Positive | None,
        Meta(
            description="CPU threads of each worker. Default: the cores divided by the number of workers, at least one."
        ),
    ] = None

    def context_tokens(self, longest: int) -> int:
        """`max_model_len`, or for `auto` the `longest` that is possible."""
        return longest if self.max_model_len == "auto" else self.max_model_len

    @property
    def resolved_context(self) -> int:
        """`max_model_len` of a config in which it is no longer `auto`."""
        assert self.max_model_len != "auto", "max_model_len must be resolved first"
        return self.max_model_len

    def step_tokens(self, device: str = "cuda", role: Role = "agg") -> int:
        """`max_num_batched_tokens`, or its default for a worker of `role` on `device`.

        On CUDA a step of 2048 tokens already computes at about the full rate. A longer one would
        only delay the requests that decode beside it.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        if self.backend == "torch" and not device.startswith("cuda"):
            return 512
        return 8192 if self.backend == "tensorrt_llm" or role == "prefill" else 2048


class TensorRtLlmConfig(Section, frozen=True):
    """Settings of the TensorRT-LLM engine alone. `engine` has the sizes that all engines share."""

    free_gpu_memory_fraction: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(description="Share of the memory beside the weights that KV may use."),
    ] = 0.85
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8", "nvfp4"],
        Meta(description="Type of KV. `auto`: the type of the weights."),
    ] = "auto"
    event_buffer_max_size: Annotated[
        Positive,
        Meta(
            description="KV events that wait to be read. When the buffer overflows, the prefix index is rebuilt."
        ),
    ] = 65536
    guided_decoding: Annotated[
        Literal["none", "xgrammar", "llguidance"],
        Meta(description="Library that enforces JSON schemas and grammars."),
    ] = "xgrammar"
    examples_dir: Annotated[
        str,
        Meta(
            description="TensorRT-LLM's `examples` folder. The flow `trtllm-build` runs `convert_checkpoint.py` from it. Default: its path in NVIDIA's images."
        ),
    ] = "/app/tensorrt_llm/examples"
    llm_args: Annotated[
        dict[str, Any],
        Meta(
            description="Additional arguments of TensorRT-LLM's `LLM` class, under their documented names. They override ours."
        ),
    ] = {}


class MockConfig(Section, frozen=True):
    """Speed of the mock engine. A rate of 0 means that the work takes no time."""

    prefill_tokens_per_s: Annotated[
        NotNegative, Meta(description="Prompt tokens computed in a second.")
    ] = 20000.0
    prefill_pair_s: Annotated[
        NotNegative,
        Meta(
            description="Time for each pair of a prompt token and an earlier one: the cost of attention in long prompts."
        ),
    ] = 0.0
    step_s: Annotated[
        NotNegative, Meta(description="Time of every step, whatever it computes.")
    ] = 0.01
    step_sequence_s: Annotated[
        NotNegative, Meta(description="Time that each decoding request adds to a step.")
    ] = 0.0001
    step_context_token_s: Annotated[
        NotNegative,
        Meta(description="Time that each token of a decoding request's context adds to a step."),
    ] = 0.0
    transfer_bytes_per_s: Annotated[
        NotNegative,
        Meta(description="Rate at which a decode worker fetches KV, one prompt after the other."),
    ] = 10e9
    transfer_latency_s: Annotated[
        NotNegative, Meta(description="Time that each transfer takes in addition to its bytes.")
    ] = 0.0
    host_bytes_per_s: Annotated[
        NotNegative,
        Meta(description="Rate at which KV blocks return from `engine.host_cache_bytes`."),
    ] = 20e9
    speedup: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="Divides all of these times.")
    ] = 1.0
    zero_delay: Annotated[
        bool,
        Meta(
            description="Nothing takes time and no timer is used: steps follow each other as fast as the scheduler allows."
        ),
    ] = False


def check_engine(engine: EngineConfig) -> None:
    """Raises ConfigError for a device, dtype or kind of weights that the engine does not have."""
    backend = engine.backend
    if backend == "tensorrt_llm" and engine.kv_cache_dtype != "auto":
        raise ConfigError(
            "engine.kv_cache_dtype",
            "the tensorrt_llm engine has its own names for KV dtypes",
            remedy="remove it, and set `tensorrt_llm.kv_cache_dtype`",
        )
    if backend == "mock" and engine.device == "cuda":
        raise ConfigError(
            "engine.device", "the mock engine uses no GPU", remedy="set it to auto or cpu"
        )
    if engine.dtype == "int8" and (backend != "torch" or engine.device == "cuda"):
        where = "CUDA" if backend == "torch" else backend
        raise ConfigError(
            "engine.dtype",
            f"int8 is for the torch engine on CPU; {where} has other formats",
            remedy="set it to auto, or `engine.device: cpu`",
        )
    if engine.weights == "dummy" and backend == "tensorrt_llm":
        raise ConfigError(
            "engine.weights",
            "the tensorrt_llm engine cannot make dummy weights",
            remedy="set `engine.backend: torch`, or `engine.weights: real`",
        )
