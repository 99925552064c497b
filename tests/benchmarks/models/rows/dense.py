"""Dense models: full attention and windows, every kind of rotary positions."""

from __future__ import annotations

from benchmarks.models.positions import LLAMA3, LLAMA4_SCALED, LONGROPE, OLMO3_YARN, YARN
from benchmarks.models.row import Row

GQA = {"num_key_value_heads": 8}
GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0156, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}  # fmt: skip
HUNYUAN_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
PHI4_MINI = {
    **GQA, "num_attention_heads": 24, "max_position_embeddings": 131072,
    "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
}  # fmt: skip
GEMMA3_SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

ROWS = [
    Row("Llama 3.x", "llama", values={**GQA, "rope_parameters": LLAMA3}),
    Row("Llama, dynamic RoPE", "llama", values={
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Llama, linear RoPE", "llama", values={
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Llama, biases", "llama", values={"attention_bias": True, "mlp_bias": True}),
    Row("Llama, YaRN", "llama", values={**GQA, "rope_parameters": YARN}),
    Row("Code World Model", "cwm"),
    Row("Mistral", "mistral", values={"sliding_window": 4096}),
    Row("Mistral, full attention", "mistral", values={"sliding_window": None, **GQA}),
    Row("Ministral 3, scaled queries", "ministral3", values={"rope_parameters": LLAMA4_SCALED}),
    Row("Ministral", "ministral", values={"head_dim": 128}),
    Row("Qwen2", "qwen2"),
    Row("Qwen2, windows", "qwen2", values={"use_sliding_window": True, "max_window_layers": 21}),
    Row("Qwen3, YaRN", "qwen3", values={**GQA, "rope_parameters": YARN}),
    Row("Qwen3", "qwen3", values={**GQA, "head_dim": 128}),
    Row("Qwen3, windows", "qwen3", values={"use_sliding_window": True, "max_window_layers": 2}),
    Row("Gemma", "gemma"),
    Row("Gemma 2", "gemma2"),
    Row("Gemma 3 (text)", "gemma3_text"),
    Row("Gemma 3 (text), scaled", "gemma3_text", values={"rope_parameters": GEMMA3_SCALED}),
    Row("VaultGemma", "vaultgemma"),
    Row("Phi", "phi"),
    Row("Phi, norms of queries and keys", "phi", values={"qk_layernorm": True}),
    Row("Phi-3, windows", "phi3", values={"sliding_window": 2047}),
    Row("Phi-4-mini", "phi3", values=PHI4_MINI),
    Row("Phi-3 and 4, longrope", "phi3", values={
        "max_position_embeddings": 131072, "rope_parameters": LONGROPE}),
    Row("GLM-4", "glm4"),
    Row("GLM-4 (2024)", "glm"),
    Row("SmolLM3", "smollm3"),
    Row("SmolLM3, windows", "smollm3", values={
        "use_sliding_window": True, "sliding_window": 4096}),
    Row("OLMo", "olmo"),
    Row("OLMo, clipped", "olmo", values={"clip_qkv": 8.0}),
    Row("OLMo 2", "olmo2"),
    Row("OLMo 3", "olmo3"),
    Row("OLMo 3, YaRN", "olmo3", values={"rope_scaling": OLMO3_YARN, "rope_theta": 5e5}),
    Row("Granite", "granite"),
    Row("Granite 3", "granite", values=GRANITE),
    Row("Granite, windows", "granite_swa"),
    Row("Granite 4.0 micro", "granitemoehybrid", values={
        "num_hidden_layers": 4, "num_local_experts": 0, "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope"}),
    Row("Cohere", "cohere"),
    Row("Cohere, norms of queries and keys", "cohere", values={"use_qk_norm": True}),
    Row("Cohere 2", "cohere2"),
    Row("Nemotron-4, Minitron", "nemotron", values=GQA),
    Row("Hunyuan", "hunyuan_v1_dense", values={"head_dim": 128}),
    Row("Hunyuan, alpha RoPE", "hunyuan_v1_dense", values={
        "head_dim": 128, "rope_parameters": HUNYUAN_ROPE}),
    Row("ERNIE 4.5", "ernie4_5"),
    Row("Seed-OSS", "seed_oss"),
    Row("EXAONE 4", "exaone4"),
    Row("EXAONE 4, windows", "exaone4", values={
        "sliding_window": 4096, "sliding_window_pattern": 4}),
    Row("HyperCLOVA X", "hyperclovax"),
    Row("Jais 2", "jais2"),
    Row("Starcoder 2", "starcoder2"),
    Row("Starcoder 2, windows", "starcoder2", values={"sliding_window": 4096}),
    Row("StarCoder (GPT-BigCode)", "gpt_bigcode"),
    Row("GPT-2", "gpt2"),
    Row("GPT-2, scaled by layer", "gpt2", values={"scale_attn_by_inverse_layer_idx": True}),
    Row("OPT", "opt"),
    Row("OPT-350m", "opt", values={
        "do_layer_norm_before": False, "word_embed_proj_dim": 512, "hidden_size": 1024,
        "num_attention_heads": 16}),
    Row("GPT-NeoX", "gpt_neox"),
    Row("GPT-NeoX, one after the other", "gpt_neox", values={"use_parallel_residual": False}),
    Row("BitNet", "bitnet"),
    Row("ModernBERT decoder", "modernbert-decoder"),
    Row("NanoChat", "nanochat"),
    Row("Persimmon", "persimmon"),
    Row("Helium", "helium"),
    Row("Arcee", "arcee"),
    Row("Apertus", "apertus"),
]  # fmt: skip
