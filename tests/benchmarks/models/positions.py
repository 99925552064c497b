"""Rotary positions as the configs of well-known models state them."""

from __future__ import annotations

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}
LLAMA4_SCALED = YARN | {"llama_4_scaling_beta": 0.1}
OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
