"""Loads the model and computes steps: flattened tokens in, chosen tokens out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from serving.engine.core.step import Chunk
from serving.engine.torch.attention import (
    NAME,
    AttentionOptions,
    AttentionStep,
    PagedStep,
    SequenceSpan,
    attend_paged,
    order_decodes,
)
from serving.engine.torch.cpu import int8_weights, packed_linear
from serving.engine.torch.cpu import kernels as cpu_kernels
from serving.engine.torch.kv_pool import KvPool
from serving.engine.torch.rewrite import lean_layers
from serving.engine.torch.sampling.sampler import Pending, Sampler, report_tokens
from serving.engine.torch.weights import dummy as dummy_weights
from serving.errors import ModelError, OperatorError
from serving.kv_layout import WEIGHT_ONLY_DTYPES, KvLayout, kv_dtype
from serving.protocol import TokenLogprob

log = logging.getLogger(__name__)

# Share of free memory that a KV pool of unstated size may take on CPU, where workers share a host.
_CPU_SHARE = 0.25


@dataclass
class Launched:
    """A step under way. `chunks` are in the order in which they are computed.

    `end` is an event behind a step that chooses nothing, on a device that computes by itself.
    """

    chunks: list[Chunk]
    pending: Pending | None
    # Of the prompts' own tokens, chunk by chunk, where that was asked for.
    prompt_report: Pending | None = None
    end: Any = None

    def result(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Wait for the step; the tokens of the chunks that sample, in their order.

        What was reported of prompts is in their sequences then. The books never run ahead of the
        device: what they call computed can be exported, and what they free can be filled by a
        transfer, neither of which waits for the engine's stream.
        """
        if self.end is not None:
            self.end.synchronize()
        if self.prompt_report is not None:
            entries = self.prompt_report.result()[1]
            for chunk in self.chunks:
                own, entries = entries[: chunk.num_reported], entries[chunk.num_reported :]
                if own:
                    # From `start` on: a preempted prompt is computed and reported again.
                    known = chunk.sequence.prompt_logprobs
                    known[chunk.start :] = [entry for entry in own if entry is not None]
        return ([], []) if self.pending is None else self.pending.result()


class ModelRunner:
    """A loaded model and its KV pool. Used by one thread, inside `torch.inference_mode`."""

    # Steps that may be launched before the first one's tokens are known.
    depth = 1

    def __init__(
        self,
        engine_dir: Path,
        *,
        device: str,
        dtype: str,
        block_size: int,
        max_model_len: int,
        max_batch_size: int,
        max_num_batched_tokens: int,
        gpu_memory_fraction: float,
        kv_cache_dtype: str = "auto",
    ) -> None:
        """Raises ModelError when the folder does not load or attention is not what we page.

        `kv_cache_dtype` is torch's name of what keys and values are kept in, or `auto` for what
        the model computes in.
        """
        self._max_model_len, self._max_batch = max_model_len, max_batch_size
        self._max_tokens = max_num_batched_tokens
        self._memory_fraction = gpu_memory_fraction
        AttentionInterface.register(NAME, attend_paged)
        self.device = torch.device(device)
        torch_dtype: torch.dtype = getattr(torch, kv_dtype(dtype))
        model: Any
        try:
            if dummy := dummy_weights.of_engine(engine_dir):
                model = dummy_weights.make_model(
                    engine_dir, dummy.seed, self.device, torch_dtype, attention=NAME
                )
                if dtype in WEIGHT_ONLY_DTYPES:
                    int8_weights.quantize(model)
            elif dtype in WEIGHT_ONLY_DTYPES:
                model = int8_weights.load(engine_dir, attention=NAME)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    engine_dir, dtype=torch_dtype, attn_implementation=NAME, local_files_only=True
                )
        except OperatorError:
            raise
        except Exception as exc:  # transformers and safetensors raise whatever they meet
            raise ModelError(
                f"{engine_dir} does not load: {exc}", remedy="rebuild the engine folder"
            ) from exc
        self._model = model.eval().to(self.device)
        config = self._model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._kernels: cpu_kernels.CpuKernels | None = None
        if packed_linear.can_pack(device, torch_dtype):
            if dtype in WEIGHT_ONLY_DTYPES:
                self._kernels = cpu_kernels.load(engine_dir)
            count = packed_linear.pack_linears(self._model, self._kernels)
            log.info("packed %d linear layers", count)
        if dtype in WEIGHT_ONLY_DTYPES:
            log.info("%s", lean_layers.rewrite(self._model))
        self.layout = self._probe(block_size, kv_cache_dtype)
        self._sampler = Sampler(self.vocab_size, self.device)
        self.pool: KvPool

    def allocate_pool(self, kv_cache_tokens: int | None) -> int:
        """Create the pool; returns its number of usable blocks.

        Raises OperatorError when it cannot hold one request of `max_model_len`.
        """
        max_model_len = self._max_model_len
        if kv_cache_tokens is None:
            tokens = self.free_for_kv() // self.layout.token_bytes
        else:
            tokens = kv_cache_tokens
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
            self.pool = KvPool(self.layout, num_blocks, str(self.device), self._kernels)
        except RuntimeError as exc:  # torch says so when memory is not to be had
            size = tokens * self.layout.token_bytes / 2**20
            raise OperatorError(
                f"a KV pool of {tokens} tokens ({size:.0f} MiB) does not fit in memory",
                remedy=f"set engine.kv_cache_tokens to less (at least {needed} blocks of "
                f"{self.layout.block_size})",
            ) from exc
        return num_blocks

    def free_for_kv(self) -> int:
        """Bytes that a KV pool of unstated size takes."""
        room = int(psutil.virtual_memory().available * _CPU_SHARE)
        # Whole blocks for every request of a full batch.
        num_blocks = self._max_batch * self._max_model_len // self.layout.block_size + 1
        return min(room, num_blocks * self.layout.block_bytes)

    def launch(self, chunks: list[Chunk]) -> Launched:
        """Compute one step and choose its tokens; on CPU both are done when this returns."""
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        decodes = [decodes[i] for i in order_decodes([c.start + 1 for c in decodes])]
        ordered = decodes + [chunk for chunk in chunks if chunk.length > 1]
        spans = [SequenceSpan(c.sequence.blocks, c.start, c.length) for c in ordered]
        step = PagedStep(self.pool, spans[: len(decodes)], spans[len(decodes) :])
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        reported: list[int] = []
        for chunk in ordered:
            end = chunk.start + chunk.length
            reported += range(len(ids), len(ids) + chunk.num_reported)
            ids += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            if chunk.samples:
                rows.append(len(ids) - 1)
        logits = self._compute_rows(ids, positions, rows + reported, step)
        return self._choose(ordered, logits)

    def _choose(self, chunks: list[Chunk], logits: torch.Tensor) -> Launched:
        """Sample from the first rows of `logits`; the others are for what chunks report."""
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        count = len(sequences)
        pending = self._sampler.sample(logits[:count], sequences) if sequences else None
        tokens: list[int] = []
        widths: list[int] = []
        for chunk in chunks:
            if num_reported := chunk.num_reported:
                first = chunk.start + 1
                tokens += chunk.sequence.tokens[first : first + num_reported]
                widths += [chunk.sequence.sampling.prompt_logprobs or 0] * num_reported
        report = report_tokens(logits[count:], tokens, widths) if tokens else None
        return Launched(chunks, pending, report)

    def warm_up(self, num_tokens: int) -> None:
        """Run a prefill and a decode step on blocks that nobody has yet, then wipe them."""
        num_tokens = max(2, min(num_tokens, self.max_positions or num_tokens))
        blocks = list(range(1, 2 + self.layout.num_blocks(num_tokens)))[: len(self.pool.tensor) - 1]
        length = min(num_tokens, len(blocks) * self.layout.block_size) - 1
        prefill = PagedStep(self.pool, [], [SequenceSpan(blocks, 0, length)])
        self._compute_rows([0] * length, list(range(length)), [length - 1], prefill)
        decode = PagedStep(self.pool, [SequenceSpan(blocks, length, 1)], [])
        self._compute_rows([0], [length], [0], decode)
        self.pool.clear(blocks)

    def _compute_rows(
        self, ids: list[int], positions: list[int], rows: list[int], step: AttentionStep
    ) -> torch.Tensor:
        inputs = torch.tensor([ids, positions]).to(self.device)
        return self._forward(
            inputs[0], inputs[1], torch.tensor(rows, dtype=torch.long).to(self.device), step
        )

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
        step: AttentionStep,
    ) -> torch.Tensor:
        """Logits (float32) of `rows` of the flattened tokens `ids` `[T]`; None: of all."""
        out = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
            kv_step=step,
        )
        logits: torch.Tensor = out.logits[0]
        return logits.float()

    def _probe(self, block_size: int, kv_cache_dtype: str) -> KvLayout:
        """Learn the shape of KV from one forward pass: config fields differ between models."""
        probe = Probe()
        with torch.inference_mode():
            self._compute_rows([0], [0], [0], probe)
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
        dtype = kv_cache_dtype
        if dtype == "auto":
            dtype = str(probe.dtype).removeprefix("torch.")
        return KvLayout(len(layers), key_heads, key_dim, block_size, dtype)


class Probe:
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
