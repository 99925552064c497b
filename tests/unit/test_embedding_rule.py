"""What the files of sentence-transformers say about a model's embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.errors import ModelError
from serving.model_folder import EmbeddingRule, embedding_rule

OLD: dict[str, Any] = {
    "word_embedding_dimension": 1024,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}


def write(folder: Path, pooling: dict[str, Any], *modules: str) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = [{"type": f"sentence_transformers.models.{name}"} for name in modules]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    return folder


def test_without_them_it_is_the_last_token_normalized(tmp_path: Path) -> None:
    assert embedding_rule(tmp_path) == EmbeddingRule("last", True, 0)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (OLD | {"pooling_mode_lasttoken": True}, "last"),
        (OLD | {"pooling_mode_mean_tokens": True}, "mean"),
        (OLD | {"pooling_mode": "mean"}, "mean"),
        (OLD, "last"),
    ],
)
def test_pooling_is_the_models(tmp_path: Path, pooling: Any, expected: Any) -> None:
    folder = write(tmp_path, pooling, "Transformer", "Pooling", "Normalize")
    assert embedding_rule(folder) == EmbeddingRule(expected, True, 64)


def test_without_the_step_that_normalizes_nothing_is_normalized(tmp_path: Path) -> None:
    folder = write(tmp_path, OLD | {"pooling_mode_lasttoken": True}, "Transformer", "Pooling")
    assert not embedding_rule(folder).normalize


@pytest.mark.parametrize(
    "modes",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
        {"pooling_mode": "max"},
    ],
)
def test_other_pooling_is_refused(tmp_path: Path, modes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="not computed here"):
        embedding_rule(write(tmp_path, OLD | modes, "Pooling"))
