"""GGUF files."""

from __future__ import annotations

from benchmarks.models.positions import LLAMA3, LONGROPE, YARN
from benchmarks.models.row import Row

GQA = {"num_key_value_heads": 8}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
WIDE = {"head_dim": 128, "hidden_size": 4096}  # rows that Q4_K can hold
OTHER_FACTORS = LLAMA3 | {"original_max_position_embeddings": 4096}
GEMMA3_SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

ROWS = [
    Row("Llama 3.x", "llama", values={**GQA, "rope_parameters": LLAMA3}, form="GGUF F16"),
    Row("Llama 3.x", "llama", values={**GQA, "rope_parameters": LLAMA3}, form="GGUF Q8_0"),
    Row("Llama 3.x", "llama", values={**GQA, **WIDE, "rope_parameters": LLAMA3}, form="GGUF Q4_K"),
    Row("Llama, other RoPE factors", "llama", values={
        **GQA, "rope_parameters": OTHER_FACTORS}, form="GGUF Q8_0"),
    Row("Llama, linear RoPE", "llama", values={"rope_parameters": LINEAR}, form="GGUF Q8_0"),
    Row("Llama, YaRN", "llama", values={**GQA, "rope_parameters": YARN}, form="GGUF Q8_0"),
    Row("Llama, biases", "llama", "refused", {"attention_bias": True}, form="GGUF Q8_0"),
    Row("Mistral Nemo", "mistral", values={
        **GQA, "head_dim": 128, "hidden_size": 5120, "sliding_window": None}, form="GGUF Q8_0"),
    Row("Mistral, windows", "mistral", "refused", {"sliding_window": 4096}, form="GGUF Q8_0"),
    Row("Qwen2", "qwen2", form="GGUF Q8_0"),
    Row("Qwen2, YaRN", "qwen2", values={"rope_parameters": YARN}, form="GGUF Q8_0"),
    Row("Qwen2-MoE", "qwen2_moe", form="GGUF Q8_0"),
    Row("Qwen3", "qwen3", values={**GQA, "head_dim": 128}, form="GGUF Q8_0"),
    Row("Qwen3", "qwen3", values={**GQA, "head_dim": 128}, form="GGUF Q4_K"),
    Row("Qwen3-MoE", "qwen3_moe", values={"norm_topk_prob": True}, form="GGUF Q8_0"),
    Row("Gemma 2", "gemma2", form="GGUF Q8_0"),
    Row("Gemma 3 (text)", "gemma3_text", form="GGUF Q8_0"),
    Row("Gemma 3 (text), scaled", "gemma3_text", values={
        "rope_parameters": GEMMA3_SCALED}, form="GGUF Q8_0"),
    Row("Phi-3, longrope", "phi3", values={
        "max_position_embeddings": 131072, "rope_parameters": LONGROPE}, form="GGUF Q8_0"),
    Row("Phi-3, windows", "phi3", values={"sliding_window": 2047}, form="GGUF F16"),
    Row("GPT-2", "gpt2", form="GGUF F16"),
    Row("Gemma", "gemma", "refused", form="GGUF F16"),
    Row("Starcoder 2", "starcoder2", "refused", form="GGUF F16"),
    Row("Granite", "granite", "refused", form="GGUF F16"),
    Row("SmolLM3", "smollm3", "refused", form="GGUF F16"),
    Row("OLMo 2", "olmo2", "refused", form="GGUF F16"),
]  # fmt: skip
