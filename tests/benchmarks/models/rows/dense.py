"""Dense models: full attention and windows, every kind of rotary positions."""

from __future__ import annotations

from benchmarks.models.positions import LLAMA3, LONGROPE, YARN
from benchmarks.models.row import Row

GQA = {"num_key_value_heads": 8}

ROWS = [
    Row("Llama 3.x", "llama", values={**GQA, "rope_parameters": LLAMA3}),
    Row("Llama, dynamic RoPE", "llama", values={
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Llama, linear RoPE", "llama", values={
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Mistral", "mistral", values={"sliding_window": 4096}),
    Row("Ministral", "ministral", values={"head_dim": 128}),
    Row("Qwen2", "qwen2"),
    Row("Qwen2, windows", "qwen2", values={"use_sliding_window": True, "max_window_layers": 21}),
    Row("Qwen3, YaRN", "qwen3", values={**GQA, "rope_parameters": YARN}),
    Row("Gemma", "gemma"),
    Row("Gemma 2", "gemma2"),
    Row("Gemma 3 (text)", "gemma3_text"),
    Row("Phi", "phi"),
    Row("Phi-3 and 4, longrope", "phi3", values={
        "max_position_embeddings": 131072, "rope_parameters": LONGROPE}),
    Row("GLM-4", "glm4"),
    Row("SmolLM3", "smollm3"),
    Row("OLMo", "olmo"),
    Row("OLMo 2", "olmo2"),
    Row("OLMo 3", "olmo3"),
    Row("Granite", "granite"),
    Row("Granite 4.0 micro", "granitemoehybrid", values={
        "num_hidden_layers": 4, "num_local_experts": 0, "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope"}),
    Row("Cohere", "cohere"),
    Row("Cohere 2", "cohere2"),
    Row("Nemotron-4, Minitron", "nemotron", values=GQA),
    Row("Hunyuan", "hunyuan_v1_dense", values={"head_dim": 128}),
    Row("ERNIE 4.5", "ernie4_5"),
    Row("Seed-OSS", "seed_oss"),
    Row("EXAONE 4", "exaone4"),
    Row("Starcoder 2", "starcoder2"),
    Row("GPT-2", "gpt2"),
    Row("GPT-NeoX", "gpt_neox"),
    Row("Helium", "helium"),
    Row("Arcee", "arcee"),
    Row("Apertus", "apertus"),
]  # fmt: skip
