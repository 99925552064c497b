"""Steps on CUDA: launched without waiting, so that the next one is prepared while this one runs.

Pure decode steps replay a CUDA graph captured for their batch size; steps with prefill chunks are
launched kernel by kernel. A decode whose input token was chosen by a step that is still running
takes it from `_last_tokens` on the device.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.config import EngineConfig
from serving.engine.core.sequence import UNKNOWN_TOKEN
from serving.engine.core.step import Chunk
from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cuda.graphs import DecodeGraph, graph_sizes
from serving.engine.torch.cuda.inputs import Packer, PrefillSpan, Slots
from serving.engine.torch.cuda.kernels.decode_attention import num_splits
from serving.engine.torch.cuda.kernels.latent_decode import num_latent_splits
from serving.engine.torch.cuda.kernels.rotary import Rotation
from serving.engine.torch.cuda.latent_step import LatentStep, can_decode
from serving.engine.torch.cuda.step import (
    CUDNN_TOKENS,
    Chunks,
    CudaStep,
    Decodes,
    cudnn_causal,
    flash_varlen,
)
from serving.engine.torch.latent import latent_of
from serving.engine.torch.probe import Probe
from serving.engine.torch.rewrite.cuda_layer import rewrite_for_cuda
from serving.engine.torch.runner import Launched, ModelRunner
from serving.engine.torch.weights.supported import require_equal_layers

log = logging.getLogger(__name__)

# Memory left for CUDA graphs, NCCL-less libraries and fragmentation, beside what was measured.
_RESERVE_BYTES = 1 << 30


class CudaRunner(ModelRunner):
    """See `ModelRunner`. Used by one thread, whose current stream all steps run on."""

    depth = 2
    graph_class = DecodeGraph
    graph_sizes = staticmethod(graph_sizes)

    def __init__(
        self, engine_dir: Path, config: EngineConfig, device: str, max_num_batched_tokens: int
    ) -> None:
        super().__init__(engine_dir, config, device, max_num_batched_tokens)
        require_equal_layers(self.layout, len(self._layers))
        self._max_batch = config.max_batch_size
        self.rewrites = rewrite_for_cuda(self._model, self.layout)
        log.info("%s", self.rewrites)
        self._packer = Packer(self.device)
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._graphs: dict[int, DecodeGraph] = {}
        self._latent = next(filter(None, map(latent_of, self._model.modules())), None)
        self._step_class = LatentStep if self._latent else CudaStep
        self._has_paged_kernel = True

    def free_for_kv(self, num_local_workers: int) -> int:
        """Bytes that the KV pool may take: `gpu_memory_fraction` of the device, less what the
        weights and the largest step need, as measured by running one."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        num_tokens = min(self._max_tokens, self.max_positions or self._max_tokens)
        ids = torch.zeros(num_tokens, dtype=torch.int32, device=self.device)
        positions = torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        last = torch.full((min(num_tokens, self._max_batch),), num_tokens - 1, device=self.device)
        self._forward(ids, positions, last, _Profile())
        torch.cuda.synchronize(self.device)
        activations = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        usable = (
            free
            - int(total * (1 - self._config.gpu_memory_fraction))
            - activations
            - _RESERVE_BYTES
        )
        log.info(
            "GPU memory: %.1f of %.1f GiB free after the weights, %.2f GiB for the largest step of "
            "%d tokens, %.1f GiB for KV (engine.gpu_memory_fraction %.2f)",
            free / 2**30, total / 2**30, activations / 2**30, num_tokens, max(0, usable) / 2**30,
            self._config.gpu_memory_fraction,
        )  # fmt: skip
        return max(0, usable)

    def warm_up(self, num_tokens: int) -> None:
        """Compile the kernels, then capture the decode graphs, largest batch first."""
        width = self.layout.num_blocks(self.max_model_len)
        self._slots = Slots(self._max_batch, width)
        shape = (self._slots.count, width)
        self._tables = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(shape[0], dtype=torch.int32, device=self.device)
        started = time.monotonic()
        if self._latent:
            self._has_paged_kernel = can_decode(self._latent, self.pool)
        self._has_cudnn = not self._latent and self._try_cudnn()
        for start in (0, self.layout.block_size):
            self._warm_chunk(start, max(2, num_tokens))
        try:
            memory: Any = None
            # Gathering needs to know on the host how long sequences are.
            sizes = self.graph_sizes(self._max_batch) if self._has_paged_kernel else []
            for size in sizes:
                self._graphs[size] = graph = self.graph_class(size, self.device, self._decode)
                memory = graph.capture(memory)
        except RuntimeError as exc:  # a model whose layers look at values on the host
            self._graphs.clear()
            torch.cuda.synchronize(self.device)
            log.warning("decode runs without CUDA graphs, slower: %s", str(exc).splitlines()[0])
        log.info(
            "%d CUDA graphs for batches up to %d in %.1f s",
            len(self._graphs), max(self._graphs, default=0), time.monotonic() - started,
        )  # fmt: skip

    def launch(self, chunks: list[Chunk]) -> Launched:
        decodes = [chunk for chunk in chunks if chunk.length == 1]
        prefills = [chunk for chunk in chunks if chunk.length > 1]
        ordered = decodes + prefills
        for chunk in ordered:
            self._slots.assign(chunk.sequence)
        is_plain = not prefills and all(
            chunk.samples and chunk.sequence.request.pooling is None for chunk in decodes
        )
        size = self._graph_size(len(decodes)) if is_plain else None
        with self._pooler.catching(ordered) as caught:
            if size is not None:
                logits, slots = self._replay(self._graphs[size], decodes)
            else:
                logits, slots = self._compute(decodes, prefills)
        launched = self._choose(ordered, logits)
        launched.pooled = self._pooler.pool(ordered, caught)
        if launched.pending is not None:
            self._last_tokens[slots.long()] = launched.pending.tokens.int()
        else:
            launched.end = self.pool.mark_step()
        return launched

    # --- decode by graph -----------------------------------------------------------------------

    def _graph_size(self, count: int) -> int | None:
        return min((size for size in self._graphs if size >= count), default=None)

    def _replay(
        self, graph: DecodeGraph, decodes: list[Chunk]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(decodes)
        vectors = self._decode_vectors(decodes, graph.size)
        at, blocks = self._slots.changes(chunk.sequence for chunk in decodes)
        parts = self._packer.pack(vectors, graph.inputs)
        if len(at):
            self._update_tables(*self._packer.pack([at, blocks]))
        graph.replay()
        return graph.logits[:count], parts[3][:count]

    def _decode_vectors(self, decodes: list[Chunk], size: int) -> list[np.ndarray]:
        """ids, positions, rows, slots and lengths, each padded to `size`."""
        table = np.zeros((5, size), dtype=np.int32)
        table[2] = -1
        block_size = self.layout.block_size
        for i, chunk in enumerate(decodes):
            sequence, start = chunk.sequence, chunk.start
            row = sequence.blocks[start // block_size] * block_size + start % block_size
            slot = sequence.slot or 0
            table[:, i] = (sequence.tokens[start], start, row, slot, start + 1)
        return list(table)

    def _update_tables(self, at: torch.Tensor, blocks: torch.Tensor) -> None:
        self._tables.view(-1)[at.long()] = blocks

    def _decode(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits of a step of decodes; `inputs` are `[5, size]`, as in `DecodeGraph`."""
        ids, positions, rows, slots, lengths = inputs.unbind()
        decodes = self._decodes(len(ids), slots, lengths)
        step = self._step_class(self.pool, rows, decodes, None)
        return self._forward(self._resolve(ids, slots), positions, None, step)

    # --- steps with prefill ----------------------------------------------------------------------

    def _compute(
        self, decodes: list[Chunk], prefills: list[Chunk]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the rows that sample, then of those that are reported; slots of the former."""
        ids, positions, rows, slots, lengths = self._decode_vectors(decodes, len(decodes))
        spans = [PrefillSpan(chunk, self.layout.block_size) for chunk in prefills]
        ids = np.concatenate([ids, *(span.ids for span in spans)])
        positions = np.concatenate([positions, *(span.positions for span in spans)])
        rows = np.concatenate([rows, *(span.rows for span in spans)])
        ends = len(decodes) + np.cumsum([0, *(chunk.length for chunk in prefills)])
        samples = [i for i, chunk in enumerate(decodes) if chunk.samples]
        samples += [int(ends[i + 1]) - 1 for i, c in enumerate(prefills) if c.samples]
        reported = [i for i, chunk in enumerate(decodes) if chunk.num_reported]
        for i, chunk in enumerate(prefills):
            reported += range(int(ends[i]), int(ends[i]) + chunk.num_reported)
        owners = [c.sequence.slot for c in [*decodes, *prefills] if c.samples]
        has_prefix = any(chunk.start for chunk in prefills)
        kv_rows = [span.kv_rows() for span in spans] if has_prefix else []
        cu_queries, num_cudnn = ends - len(decodes), 0
        if len(prefills) == 1 and not has_prefix and self._has_cudnn:
            num_cudnn = prefills[0].length // CUDNN_TOKENS * CUDNN_TOKENS
            cu_queries = np.asarray([0, prefills[0].length - num_cudnn])
        cu_keys = np.cumsum([0, *(chunk.start + chunk.length for chunk in prefills)])
        at, blocks = self._slots.changes(chunk.sequence for chunk in decodes)
        packed = self._packer.pack(
            [
                ids, positions, rows, slots, lengths,
                cu_queries.astype(np.int32), cu_keys.astype(np.int32),
                np.concatenate(kv_rows) if kv_rows else np.empty(0, np.int32),
                np.asarray(samples + reported, np.int32), np.asarray(owners, np.int32), at, blocks,
            ]
        )  # fmt: skip
        if len(at):
            self._update_tables(packed[10], packed[11])
        longest = max((chunk.start + 1 for chunk in decodes), default=0)
        step = self._step_class(
            self.pool,
            packed[2],
            self._decodes(len(decodes), packed[3], packed[4], longest) if decodes else None,
            Chunks(
                [c.start for c in prefills],
                [c.length for c in prefills],
                packed[5],
                packed[6],
                packed[7] if has_prefix else None,
                num_cudnn,
            )
            if prefills
            else None,
        )
        device_ids = packed[0]
        if decodes:
            own = self._resolve(device_ids[: len(decodes)], packed[3])
            device_ids = torch.cat([own, device_ids[len(decodes) :]])
        logits = self._forward(device_ids, packed[1], packed[8].long(), step)
        return logits, packed[9]

    def _resolve(self, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Input tokens, those that the host does not know yet from the device."""
        return torch.where(ids == UNKNOWN_TOKEN, self._last_tokens[slots.long()], ids)

    def _decodes(
        self, count: int, slots: torch.Tensor, lengths: torch.Tensor, longest: int | None = None
    ) -> Decodes:
        """`longest` of `lengths`, if the host knows."""
        if self._latent:
            splits = num_latent_splits(
                count, self._latent.num_heads, self.max_model_len, self._processors
            )
        else:
            heads = self.layout.num_kv_heads
            splits = num_splits(count, heads, self.max_model_len, self._processors)
        gathered = None if self._has_paged_kernel else longest
        return Decodes(count, slots, lengths, self._tables, splits, gathered)

    def _try_cudnn(self) -> bool:
        """Whether cuDNN's attention runs and agrees with FlashAttention; prepares its plans."""
        layout = self.layout
        lengths = range(CUDNN_TOKENS, self._max_tokens + 1, CUDNN_TOKENS)
        if self.pool.tensor.dtype not in (torch.bfloat16, torch.float16) or not lengths:
            return False
        num_heads = self._model.config.get_text_config().num_attention_heads + (
            2 * layout.num_kv_heads
        )
        shape = (lengths[-1], num_heads, layout.head_dim)
        qkv = torch.randn(shape, dtype=self.pool.tensor.dtype, device=self.device)
        sizes = [num_heads - 2 * layout.num_kv_heads, layout.num_kv_heads, layout.num_kv_heads]
        query, key, value = torch.split(qkv, sizes, dim=1)
        options = AttentionOptions(layout.head_dim**-0.5, None, None, None)
        (cu,) = self._packer.pack([np.asarray([0, lengths[0]], dtype=np.int32)])
        first = slice(0, lengths[0])
        whole = Chunks([0], [lengths[0]], cu, cu)
        expected = flash_varlen(query[first], key[first], value[first], whole, options)
        try:
            for length in lengths:
                out = cudnn_causal(query[:length], key[:length], value[:length], options.scaling)
                if length == lengths[0] and not torch.allclose(out, expected, atol=0.03):
                    log.warning("cuDNN's attention differs from FlashAttention's and is not used")
                    return False
        except RuntimeError as exc:
            log.info("no cuDNN attention: %s", str(exc).splitlines()[0])
            return False
        return True

    def _warm_chunk(self, start: int, length: int) -> None:
        """A prefill chunk after `start` tokens, on blocks that no request holds yet."""
        num_blocks = self.layout.num_blocks(start + length)
        if num_blocks >= len(self.pool.tensor):
            return
        rows = np.arange(self.layout.block_size, self.layout.block_size + start + length)
        cu = [np.asarray([0, length]), np.asarray([0, start + length])]
        vectors = [np.zeros(length), np.arange(start, start + length), rows[start:], *cu, rows]
        ids, positions, own, queries, keys, kv = self._packer.pack(
            [vector.astype(np.int32) for vector in vectors]
        )
        chunks = Chunks([start], [length], queries, keys, kv if start else None)
        last = torch.tensor([length - 1], device=self.device)
        self._forward(ids, positions, last, self._step_class(self.pool, own, None, chunks))
        self.pool.clear(range(1, num_blocks + 1))


class _Profile(Probe):
    """Measures a step's memory without a pool: attention hands the queries back."""

    keeps_tensors = False

    def attend_joint(
        self,
        layer: int,
        qkv: torch.Tensor,
        num_q_heads: int,
        rotation: Rotation,
        options: Any,
    ) -> torch.Tensor:
        return qkv[:, :num_q_heads].contiguous()
