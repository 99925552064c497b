"""Loads the model and computes steps: flattened tokens in, logits of the sampling rows out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from serving.engine.torch import packed_linear
from serving.engine.torch.attention import (
    NAME,
    AttentionOptions,
    AttentionStep,
    PagedStep,
    SequenceSpan,
    attend_paged,
    order_decodes,
)
from serving.engine.torch.kv_pool import KvPool
from serving.engine.torch.sequence import Chunk
from serving.errors import ModelError, OperatorError
from serving.kv_layout import KvLayout

log = logging.getLogger(__name__)

# Shares of free memory that a KV pool of unstated size may take. On CPU, workers share a host.
_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85


class ModelRunner:
    """A loaded model and its KV pool. Used by one thread, inside `torch.inference_mode`."""

    def __init__(self, engine_dir: Path, *, device: str, dtype: str, block_size: int) -> None:
        """Raises ModelError when the folder does not load or attention is not what we page."""
        AttentionInterface.register(NAME, attend_paged)
        self.device = torch.device(device)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                engine_dir, dtype=torch_dtype, attn_implementation=NAME, local_files_only=True
            )
        except Exception as exc:  # transformers and safetensors raise whatever they meet
            raise ModelError(
                f"{engine_dir} does not load: {exc}", remedy="rebuild the engine folder"
            ) from exc
        self._model = model.eval().to(self.device)
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        if packed_linear.can_pack(device, torch_dtype):
            log.info("packed %d linear layers", packed_linear.pack_linears(self._model))
        self.layout = self._probe(block_size)
        self.pool: KvPool

    def allocate_pool(
        self, kv_cache_tokens: int | None, *, max_model_len: int, max_batch_size: int
    ) -> int:
        """Create the pool; returns its number of usable blocks.

        Raises OperatorError when it cannot hold one request of `max_model_len`.
        """
        wanted = max_batch_size * max_model_len
        tokens = self._default_tokens(wanted) if kv_cache_tokens is None else kv_cache_tokens
        num_blocks = tokens // self.layout.block_size
        needed = self.layout.num_blocks(max_model_len)
        if num_blocks < needed:
            least = needed * self.layout.block_size
            source = "free memory allows" if kv_cache_tokens is None else "it is"
            raise OperatorError(
                f"`engine.kv_cache_tokens`: {source} {tokens}, too few for one request of "
                f"`engine.max_model_len` {max_model_len}",
                remedy=f"set engine.kv_cache_tokens to {least} or more "
                f"({least * self.layout.token_bytes / 2**20:.0f} MiB), or lower engine.max_model_len",
            )
        try:
            self.pool = KvPool(self.layout, num_blocks, str(self.device))
        except RuntimeError as exc:  # torch says so when memory is not to be had
            size = tokens * self.layout.token_bytes / 2**20
            raise OperatorError(
                f"a KV pool of {tokens} tokens ({size:.0f} MiB) does not fit in memory",
                remedy=f"set engine.kv_cache_tokens to less (at least {needed} blocks of "
                f"{self.layout.block_size})",
            ) from exc
        return num_blocks

    def execute(self, chunks: list[Chunk]) -> tuple[list[Chunk], torch.Tensor]:
        """Compute one step.

        Returns the chunks in the order they were computed in, and the float32 logits
        `[B, vocab]` of those of them that sample, in that order.
        """
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        decodes = [decodes[i] for i in order_decodes([c.start + 1 for c in decodes])]
        ordered = decodes + [chunk for chunk in chunks if chunk.length > 1]
        spans = [SequenceSpan(c.sequence.blocks, c.start, c.length) for c in ordered]
        step = PagedStep(self.pool, spans[: len(decodes)], spans[len(decodes) :])
        ids: list[int] = []
        positions: list[int] = []
        sampling_rows: list[int] = []
        for chunk in ordered:
            end = chunk.start + chunk.length
            ids += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            if chunk.samples:
                sampling_rows.append(len(ids) - 1)
        logits = self._forward(ids, positions, sampling_rows, step)
        written = self.pool.mark_step()
        for chunk in ordered:
            chunk.sequence.written = written
        if written is not None and not sampling_rows:
            # Nothing is read from this step, yet blocks that its end frees may be filled by a
            # transfer, which does not wait for the engine's stream.
            written.synchronize()
        return ordered, logits

    def warm_up(self, num_tokens: int) -> None:
        """Run a prefill and a decode step on blocks that nobody has yet, then wipe them."""
        num_tokens = max(2, min(num_tokens, self.max_positions or num_tokens))
        blocks = list(range(1, 2 + self.layout.num_blocks(num_tokens)))[: len(self.pool.tensor) - 1]
        length = min(num_tokens, len(blocks) * self.layout.block_size) - 1
        prefill = PagedStep(self.pool, [], [SequenceSpan(blocks, 0, length)])
        self._forward([0] * length, list(range(length)), [length - 1], prefill)
        decode = PagedStep(self.pool, [SequenceSpan(blocks, length, 1)], [])
        self._forward([0], [length], [0], decode)
        self.pool.clear(blocks)

    def _forward(
        self, ids: list[int], positions: list[int], rows: list[int], step: AttentionStep
    ) -> torch.Tensor:
        inputs = torch.tensor([ids, positions, rows + [0] * (len(ids) - len(rows))])
        inputs = inputs.to(self.device)
        out = self._model(
            input_ids=inputs[0:1],
            position_ids=inputs[1:2],
            use_cache=False,
            logits_to_keep=inputs[2, : len(rows)],
            kv_step=step,
        )
        logits: torch.Tensor = out.logits[0]
        return logits.float()

    def _probe(self, block_size: int) -> KvLayout:
        """Learn the shape of KV from one forward pass: config fields differ between models."""
        probe = _Probe()
        with torch.inference_mode():
            self._forward([0], [0], [0], probe)
        shapes = set(probe.shapes.values())
        layers = sorted(probe.shapes)
        if len(shapes) != 1 or layers != list(range(len(layers))):
            raise ModelError(
                f"attention layers {layers} with key and value shapes {sorted(shapes, key=str)}: "
                "only models whose layers all keep keys and values of one shape can be paged",
                remedy="choose another model",
            )
        (key_heads, key_dim), value_shape = shapes.pop()
        if (key_heads, key_dim) != value_shape:
            raise ModelError("keys and values differ in shape", remedy="choose another model")
        dtype = str(probe.dtype).removeprefix("torch.")
        return KvLayout(len(layers), key_heads, key_dim, block_size, dtype)

    def _default_tokens(self, wanted: int) -> int:
        """Pool size in tokens when the configuration leaves it open."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free * _CUDA_SHARE) // self.layout.token_bytes
        room = int(psutil.virtual_memory().available * _CPU_SHARE) // self.layout.token_bytes
        # Whole blocks for every request of a full batch.
        per_batch = wanted + self.layout.block_size - wanted % self.layout.block_size
        return min(room, per_batch)


class _Probe:
    """Stands behind the attention layers once and notes what they are given."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        self.dtype = torch.float32

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.shapes[layer] = (
            (key.shape[0], key.shape[2]),
            (value.shape[0], value.shape[2]),
        )
        self.dtype = key.dtype
        return query.transpose(0, 1)
