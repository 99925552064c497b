"""How much GPU memory one worker will need, estimated before anything is loaded.

The estimate is rather too low than too high: a refused engine cannot run, an accepted one may
still be tight. Where its numbers come from:

* weights: the tensors in the checkpoint, divided by tensor and pipeline parallel;
* KV of a token: the shape in config.json, times the KV dtype;
* activations: the widest moment of one layer for `max_num_batched_tokens` tokens, which is the
  residual, its normed copy, and the gate and up projections (or queries, keys and values);
* logits: float32, for each request of a batch, with a copy for sampling; with `trtllm-build` also
  those of `GENERATION_LOGITS_BUFFER_LENGTH` steps, of which log-probabilities are made;
* transfer buffers: the transceiver allocates `max_tokens_in_buffer` tokens to send and as many to
  receive, outside the KV pool;
* CUDA graphs: the library's argument `cuda_graph_config` documents up to 200 MB each, and by default one
  for 1, 2, 4 and each multiple of 8 up to 128. Most stay far below it, so they only warn;
* runtime: a CUDA context with its libraries' workspaces, an allowance of our own.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from serving.config import Config
from serving.engine.files import human
from serving.engine.trtllm.build.checkpoint import Checkpoint
from serving.engine.trtllm.build.target import Parallelism
from serving.errors import ConfigError, OperatorError
from serving.kv_layout import DTYPE_BYTES
from serving.protocol import Role

RUNTIME_BYTES = 1_000_000_000
CUDA_GRAPH_BYTES = 200_000_000
LARGEST_GRAPH_BATCH = 128
GATHERED_STEPS = 8
"""`GENERATION_LOGITS_BUFFER_LENGTH` in its runtimeBuffers.h."""
_KV_BYTES = {"fp8": 1.0, "nvfp4": 0.5625}  # 4 bits, and a byte of scale for each 16


class Estimate(Struct, frozen=True, kw_only=True):
    """Bytes on each GPU of one worker. `kv_token` is KV of one token, `buffer_token` what each
    token of the longest prompt costs in transfer buffers; `graphs` is an upper bound."""

    role: Role
    weights: int
    kv_token: float
    buffer_token: float
    activations: int
    graphs: int
    runtime: int = RUNTIME_BYTES

    @property
    def fixed(self) -> int:
        """What is there whatever the length of prompts."""
        return self.weights + self.activations + self.runtime

    def needed(self, max_model_len: int) -> float:
        """With KV for one request of this length."""
        return self.fixed + (self.kv_token + self.buffer_token) * max_model_len

    def longest(self, memory_bytes: int, kv_share: float) -> int:
        """The longest request, in tokens, for which the share of KV is enough; 0 for none."""
        room = memory_bytes - self.fixed
        if room <= 0:
            return 0
        # kv_share * (room - buffer_token * n) >= kv_token * n
        return int(kv_share * room / (self.kv_token + kv_share * self.buffer_token))


def estimate(
    checkpoint: Checkpoint, config: Config, role: Role, spread: Parallelism, dtype: str
) -> Estimate:
    """`dtype` is what the weights are loaded in, unless they are quantized."""
    engine = config.engine
    width = DTYPE_BYTES[dtype]
    kv_width = float(checkpoint.kv_width)
    if checkpoint.num_kv_heads:  # MLA's latent is on every GPU; heads are divided, and never split
        per_head = checkpoint.kv_width / checkpoint.num_kv_heads
        kv_width = per_head * max(1, -(-checkpoint.num_kv_heads // spread.tensor))
    layers = -(-checkpoint.num_layers // spread.pipeline)
    kv_dtype = config.tensorrt_llm.kv_cache_dtype
    if kv_dtype == "auto" and checkpoint.quantization and checkpoint.quantization.kv_algorithm:
        kv_dtype = "fp8"
    kv_token = layers * kv_width * _KV_BYTES.get(kv_dtype, width)
    widest = 2 * checkpoint.hidden_size + 2 * max(
        checkpoint.intermediate_size // spread.tensor, checkpoint.hidden_size
    )
    batch = engine.max_batch_size
    tokens = max(engine.step_tokens(), batch)
    logits = 2 + (GATHERED_STEPS if engine.flow == "trtllm-build" else 0)
    return Estimate(
        role=role,
        weights=checkpoint.weight_bytes_as(dtype) // spread.num_gpus,
        kv_token=kv_token,
        buffer_token=0.0 if role == "agg" else 2 * kv_token,
        activations=tokens * widest * width + logits * 4 * batch * checkpoint.vocab_size,
        graphs=0 if role == "prefill" else CUDA_GRAPH_BYTES * num_graphs(batch),
    )


def num_graphs(max_batch_size: int) -> int:
    """How many batch sizes get a CUDA graph by default."""
    sizes = [1, 2, 4, *range(8, LARGEST_GRAPH_BATCH + 1, 8)]
    return sum(size <= max_batch_size for size in sizes)


def require_memory(
    checkpoint: Checkpoint,
    config: Config,
    parallelism: Mapping[Role, Parallelism],
    *,
    dtype: str,
    memory_bytes: int,
) -> list[str]:
    """Lines for a person: the estimate of each role, with a warning where it is tight.

    `memory_bytes` is that of the smallest GPU, 0 when unknown. Raises OperatorError, which names the
    number to lower and its new value, when one request of `engine.max_model_len` does not fit.
    """
    _require_pool(config)
    lines = []
    for role, spread in parallelism.items():
        found = estimate(checkpoint, config, role, spread, dtype)
        if not memory_bytes:
            lines.append(
                f"{role}: {human(found.weights)} of weights on each GPU, whose memory is not known "
                "here: not compared"
            )
            continue
        _require_fit(found, config, spread, memory_bytes)
        share = config.tensorrt_llm.free_gpu_memory_fraction
        room = max(0.0, share * (memory_bytes - found.needed(0) - found.graphs))
        line = (
            f"{role}: {human(found.weights)} of weights on each GPU of {human(memory_bytes)}, "
            f"room for about {room / found.kv_token:.3g} tokens of KV"
        )
        if room < found.kv_token * config.engine.resolved_context:
            line += (
                "; tight: if it runs out of memory while it captures CUDA graphs, lower "
                "engine.max_batch_size"
            )
        lines.append(line)
    return lines


def longest_context(
    checkpoint: Checkpoint,
    config: Config,
    parallelism: Mapping[Role, Parallelism],
    *,
    dtype: str,
    memory_bytes: int,
) -> int:
    """What `engine.max_model_len: auto` means: the checkpoint's limit, bounded by the KV pool.

    At least one block, so that `require_memory` can explain why nothing fits.
    """
    block, share = config.engine.block_size, config.tensorrt_llm.free_gpu_memory_fraction
    bounds = [checkpoint.model_max_len, config.engine.kv_cache_tokens or checkpoint.model_max_len]
    if memory_bytes:
        bounds += [
            estimate(checkpoint, config, role, spread, dtype).longest(memory_bytes, share)
            // block
            * block
            for role, spread in parallelism.items()
        ]
    return max(block, min(bounds))


def _require_pool(config: Config) -> None:
    tokens, longest = config.engine.kv_cache_tokens, config.engine.resolved_context
    if tokens is not None and tokens < longest:
        raise ConfigError(
            "engine.kv_cache_tokens",
            f"a pool of {tokens} tokens does not hold one request of `engine.max_model_len` "
            f"{longest}",
            remedy=f"set it to {longest} or more, or lower `engine.max_model_len`",
        )


def _require_fit(found: Estimate, config: Config, spread: Parallelism, memory_bytes: int) -> None:
    length = config.engine.resolved_context
    share = config.tensorrt_llm.free_gpu_memory_fraction
    longest = found.longest(memory_bytes, share)
    if longest >= length:
        return
    block = config.engine.block_size
    what = (
        f"each {found.role} worker needs about {human(found.needed(length))} on each GPU, which has "
        f"{human(memory_bytes)}: {human(found.weights)} of weights, "
        f"{human(found.activations + found.runtime)} for activations and runtime, and "
        f"{human((found.kv_token + found.buffer_token) * length)} for one request of {length} "
        f"tokens, for which it may use {share:.0%} of what is left"
    )
    if longest >= block:
        remedy = (
            f"lower `engine.max_model_len` to {longest // block * block}, or raise "
            f"`workers.tensor_parallel` of {found.role} above {spread.tensor}"
        )
    elif found.weights + found.runtime < memory_bytes:
        excess = found.fixed - found.activations
        tokens = int(
            config.engine.step_tokens()
            * max(0.0, 0.5 * (memory_bytes - excess) / found.activations)
        )
        remedy = (
            f"lower `engine.max_num_batched_tokens` to {max(tokens, 1)} and "
            f"`engine.max_batch_size`, or raise `workers.tensor_parallel` of {found.role} above "
            f"{spread.tensor}"
        )
    else:
        remedy = _more_gpus(found, spread, memory_bytes)
    raise OperatorError(what, remedy=remedy)


def _more_gpus(found: Estimate, spread: Parallelism, memory_bytes: int) -> str:
    """How many GPUs hold the weights with a tenth of each left for everything else."""
    room = 0.9 * memory_bytes - found.runtime
    whole = found.weights * spread.num_gpus
    tensor = spread.tensor
    while room > 0 and tensor * spread.pipeline * room < whole:
        tensor *= 2
    if room <= 0:
        return "use GPUs with more memory: these have too little for the runtime alone"
    return (
        f"give it {tensor * spread.pipeline} GPUs (`workers.tensor_parallel`: "
        f"{{{found.role}: {tensor}}}), or choose a smaller or a quantized model"
    )
