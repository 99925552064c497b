"""A multimodal checkpoint in small: every part of it is there, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from serving.engine.torch.build_check.shrink import draw_weights, shrink
from serving.engine.torch.weights.multimodal.outer_model import multimodal_class, without_towers
from transformers import GenerationConfig

_LAYERS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "vision_layers")


def small_multimodal_of(config: Any, folder: Path, seed: int) -> None:
    """Save it to `folder`, with the names that checkpoints of its family have on the hub."""
    small = copy.deepcopy(config)
    small.text_config = shrink(config.get_text_config())
    small.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    small.pad_token_id = 0
    for key in ("vision_config", "audio_config"):
        tower = getattr(small, key, None)
        for layers in _LAYERS:
            if tower is not None and isinstance(getattr(tower, layers, None), int):
                setattr(tower, layers, 1)
    torch.manual_seed(seed)
    kind = multimodal_class(small)
    try:
        model = kind._from_config(small, dtype=torch.float32).eval()
    except ImportError:  # of the library of an encoder
        with without_towers(small):
            model = kind._from_config(small, dtype=torch.float32).eval()
    with torch.inference_mode():
        draw_weights(model)
        model.tie_weights()
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
