"""Windows and chunks are read from masks, and masks of other kinds are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engine.torch.attention import NAME
from serving.engine.torch.attention_masks import Reach, reach_of
from serving.engine.torch.loading import load_model
from serving.errors import ModelError
from transformers import MistralConfig, PhimoeConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from unit.engine.torch_rig import SIZES, save_model


@pytest.mark.parametrize("span", [100, 131072])
def test_windows_and_chunks_beyond_every_prompt_are_found(span: int) -> None:
    assert reach_of(causal_mask_function, span) == Reach()
    assert reach_of(sliding_window_causal_mask_function(40), span) == Reach(window=40)
    assert reach_of(sliding_window_causal_mask_function(span), span) == Reach()
    no_padding = torch.zeros(1, dtype=torch.long)
    for chunk in (2, 40, 99):
        assert reach_of(chunked_causal_mask_function(chunk, no_padding), span) == Reach(chunk=chunk)
    assert reach_of(chunked_causal_mask_function(span, no_padding), span) == Reach()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (bidirectional_mask_function, "later ones"),
        (
            lambda b, h, q, k: (k <= q) & (k > q - torch.where(q < 400, 40, 80)),
            "on the position",
        ),
        (
            lambda b, h, q, k: (k <= q) & (k >= q // 40 * 40 - 1),  # one token of the chunk before
            "on the position",
        ),
        (
            and_masks(
                causal_mask_function,
                packed_sequence_mask_function(torch.zeros((1, 5), dtype=torch.long)),
            ),
            "depends on the prompt",
        ),
        (lambda b, h, q, k: (k <= q) & (k % 2 == 0), "hides tokens"),
    ],
)
def test_other_masks_are_refused(mask: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        reach_of(mask, 1000)


@pytest.mark.parametrize("family", [MistralConfig, PhimoeConfig])
def test_the_mask_decides_and_the_model_pages_afterwards(family: Any, tmp_path: Path) -> None:
    sizes = {**SIZES, "max_position_embeddings": 4096}
    folder = save_model(tmp_path / "model", family(**sizes, sliding_window=1000))
    model = load_model(folder, "float32", torch.device("cpu")).model
    assert [layer.self_attn.learned_reach for layer in model.model.layers] == [Reach(1000)] * 2
    assert model.config._attn_implementation == NAME
