"""Checkpoints for tests: their files, and what is read from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from serving.config import Config, parse
from serving.engine.trtllm.build.checkpoint import Checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def shard(path: Path, num_bytes: int) -> None:
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))


GB = 10**9
LLAMA_8B: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "kv_width": 2 * 8 * 128,
    "vocab_size": 128256,
    "model_max_len": 131072,
    "stored_dtype": "bfloat16",
    "weight_bytes": 16 * GB,
    "quantization": None,
}


def checkpoint(**changed: Any) -> Checkpoint:
    return Checkpoint(**(LLAMA_8B | changed))


def config(**engine: Any) -> Config:
    settings = engine.pop("tensorrt_llm", {})
    raw = {
        "backend": "tensorrt_llm",
        "max_model_len": 2048,
        "max_num_batched_tokens": 8192,
        **engine,
    }
    return parse({"engine": raw, "tensorrt_llm": settings})
