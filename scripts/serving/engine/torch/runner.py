"""Loads the model and computes steps: flattened tokens in, chosen tokens out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serving.config import EngineConfig
from serving.engine.core.step import Chunk
from serving.engine.torch.attention import (
    AttentionStep,
    PagedStep,
    SequenceSpan,
    begin_forward,
    order_decodes,
)
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.loading import load_model
from serving.engine.torch.pooling import Pooled, Pooler
from serving.engine.torch.probe import Probe
from serving.engine.torch.sampling.sampler import Pending, Sampler, report_tokens
from serving.engine.torch.weights.context import model_max_len
from serving.errors import OperatorError
from serving.host_memory import host_memory
from serving.protocol import TokenLogprob

# Share of free memory that KV pools of unstated size may take on CPU, all workers of a host together.
_CPU_SHARE = 0.5


@dataclass
class Launched:
    """A step under way. `chunks` are in the order in which they are computed.

    `end` is an event behind a step that chooses nothing, on a device that computes by itself.
    """

    chunks: list[Chunk]
    pending: Pending | None
    # Log-probabilities of the prompts' own tokens, chunk by chunk, where requests want them.
    prompt_report: Pending | None = None
    end: Any = None
    pooled: Pooled = field(default_factory=Pooled)

    def result(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Wait for the step; the tokens of the chunks that sample, in their order.

        The reports of prompts are in their sequences then. The scheduler never runs ahead of the
        device: blocks that it calls computed can be exported, and blocks that it frees can be
        filled by a transfer, and neither waits for the engine's stream.
        """
        if self.end is not None:
            self.end.synchronize()
        self.pooled.deliver()
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
        self, engine_dir: Path, config: EngineConfig, device: str, max_num_batched_tokens: int
    ) -> None:
        """Raises ModelError when the folder does not load or attention is not what we page.

        `device` is torch's name of one; `max_num_batched_tokens` the most tokens of one step.
        """
        self.device = torch.device(device)
        self._config, self._max_tokens = config, max_num_batched_tokens
        loaded = load_model(engine_dir, config.dtype, self.device)
        self._model, self._kernels = loaded.model, loaded.kernels
        model_config = self._model.config.get_text_config()
        self.vocab_size: int = model_config.vocab_size
        self.max_positions = model_max_len(model_config)
        probe = self._probe()
        self.layout = probe.layout(config.block_size, config.kv_cache_dtype)
        self._layers = probe.layers()
        self._pooler = Pooler(self._model)
        self._sampler = Sampler(self.vocab_size, self.device)
        self.pool: KvPool
        self.max_model_len: int  # known with the pool

    def allocate_pool(self, num_local_workers: int = 1) -> int:
        """Create the pool and find `max_model_len`; returns the number of usable blocks.

        `num_local_workers` share the memory of this host. Raises OperatorError when the pool cannot
        hold one request of the configured `max_model_len`.
        """
        kv_cache_tokens = self._config.kv_cache_tokens
        if kv_cache_tokens is None:
            tokens = self.free_for_kv(num_local_workers) // self.layout.token_bytes
        else:
            tokens = kv_cache_tokens
        num_blocks = tokens // self.layout.block_size
        room = max(1, num_blocks) * self.layout.block_size
        max_model_len = self._config.context_tokens(min(self.max_positions or room, room))
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
        self.max_model_len = max_model_len
        try:
            self._require_host_memory(num_blocks)
            self.pool = KvPool(
                self.layout, num_blocks, str(self.device), self._kernels, self._layers
            )
        except (RuntimeError, MemoryError) as exc:  # how torch reports that memory ran out
            size = tokens * self.layout.token_bytes / 2**20
            raise OperatorError(
                f"a KV pool of {tokens} tokens ({size:.0f} MiB) does not fit in memory",
                remedy=f"set engine.kv_cache_tokens to less (at least {needed} blocks of "
                f"{self.layout.block_size})",
            ) from exc
        return num_blocks

    def _require_host_memory(self, num_blocks: int) -> None:
        """Raises MemoryError. The pool would be allocated all the same, and end the process later."""
        size = num_blocks * self.layout.block_bytes
        if self.device.type == "cpu" and size > host_memory().available:
            raise MemoryError(f"{size} bytes")

    def free_for_kv(self, num_local_workers: int) -> int:
        """Bytes that a KV pool of unstated size takes."""
        room = int(host_memory().available * _CPU_SHARE / num_local_workers)
        longest = self._config.context_tokens(self.max_positions or room)
        # Whole blocks for every request of a full batch.
        num_blocks = self._config.max_batch_size * longest // self.layout.block_size + 1
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
        with self._pooler.catching(ordered) as caught:
            logits = self._compute_rows(ids, positions, rows + reported, step)
        launched = self._choose(ordered, logits)
        launched.pooled = self._pooler.pool(ordered, caught)
        return launched

    def _choose(self, chunks: list[Chunk], logits: torch.Tensor) -> Launched:
        """Sample from the first rows of `logits`; the other rows are for prompt log-probabilities."""
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

    def prove(self) -> None:
        """Raises when the device computes nothing any more, as after an illegal access on a GPU:
        then no step of any request would succeed."""
        torch.ones(1, device=self.device).add_(1).item()

    def warm_up(self, num_tokens: int) -> None:
        """Run a prefill and a decode step on blocks that no request holds yet, then clear them."""
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
        begin_forward(step)
        out = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
            kv_step=step,
        )
        logits: torch.Tensor = out.logits[0]
        return logits.float()

    def _probe(self) -> Probe:
        """Learn the shape of KV from one forward pass: config fields differ between models."""
        probe = Probe()
        with torch.inference_mode():
            self._compute_rows([0], [0], [0], probe)
        return probe
