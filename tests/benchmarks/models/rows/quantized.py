"""Quantized checkpoints."""

from __future__ import annotations

from benchmarks.models.row import Row
from benchmarks.models.rows.latent import K2, V3

ROWS = [
    Row("Llama 3.x", "llama", "refused", form="tensors with scales"),
    Row("Llama 3.x", "llama", "refused", form="HQQ"),
    Row("Qwen3", "qwen3", form="FP8 in blocks"),
    Row("Qwen3-MoE", "qwen3_moe", form="FP8 in blocks"),
    Row("DeepSeek V3", "deepseek_v3", values=V3, form="FP8 in blocks"),
    Row("Kimi K2 Thinking", "deepseek_v3", values=K2, form="int4 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="FP8 by FBGEMM"),
    Row("Llama 3.x", "llama", form="FP8 by ModelOpt"),
    Row("Llama 3.x", "llama", form="NVFP4 by ModelOpt"),
    Row("gpt-oss", "gpt_oss", form="MXFP4"),
    Row("Llama 3.x", "llama", form="FP8 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="int8 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="int4 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="asymmetric int4 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="NVFP4 by compressed-tensors"),
    Row("Llama 3.x", "llama", form="AWQ"),
    Row("Llama 3.x", "llama", form="GPTQ"),
    Row("Qwen2", "qwen2", form="GPTQ, 8 bits in the order of activations"),
    Row("Llama 3.x", "llama", form="GPTQ v2, 3 bits"),
    Row("Llama 3.x", "llama", form="bitsandbytes NF4"),
    Row("Llama 3.x", "llama", form="bitsandbytes int8"),
]
