"""Bytes and FLOPs that a dense transformer needs, counted from its modules without their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from serving.engine.manifest import load_manifest
from serving.kv_layout import DTYPE_BYTES
from transformers import AutoConfig, AutoModelForCausalLM


class ModelCosts:
    """Every weight but the embedding is read once a step, and multiplied once a token."""

    def __init__(self, engine_dir: Path, dtype: str) -> None:
        config = AutoConfig.from_pretrained(engine_dir, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        layout = load_manifest(engine_dir).kv_layout
        assert layout is not None
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.num_weights = sum(parameter.numel() for parameter in model.parameters())
        self._read = self.num_weights - (0 if embedding is head else embedding.numel())
        linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self._head = head.numel()
        self._body = sum(weight.numel() for weight in linear if weight is not head)
        self._dtype_bytes = DTYPE_BYTES[dtype]
        self._token_bytes = layout.token_bytes
        self._attention = layout.num_layers * config.num_attention_heads * layout.head_dim

    def read_bytes(self, batch: int, context: int) -> tuple[int, int]:
        """Weights and KV that one decode step reads."""
        return self._read * self._dtype_bytes, batch * context * self._token_bytes

    def prefill_flops(self, num_tokens: int) -> int:
        """Of one prompt: linear layers, causal attention, and the head for the last token."""
        attention = 2 * self._attention * num_tokens * (num_tokens + 1)
        return 2 * self._body * num_tokens + 2 * self._head + attention
