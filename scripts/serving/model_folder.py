"""Facts from the small files in a model's folder, for the parts that share them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from tokenizers import Tokenizer

from serving.errors import ModelError
from serving.protocol import Pooling

_MODE = "pooling_mode_"
_POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean"}
_MODES = {
    *("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"),
    *_POOLINGS,
}


def json_object(file: Path) -> dict[str, Any]:
    """Its content; empty when there is no such file. Raises ModelError."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (ValueError, OSError) as exc:
        raise ModelError(f"{file} cannot be read: {exc}") from exc


POOLING_FILES = ("modules.json", "1_Pooling/config.json")
"""Of sentence-transformers: the steps from text to embedding, and how hidden states are pooled."""


class EmbeddingRule(Struct, frozen=True):
    """How a model's embeddings are made, and how many numbers they have (0: unknown)."""

    pooling: Pooling = "last"
    normalize: bool = True
    size: int = 0


@functools.lru_cache(maxsize=8)
def embedding_rule(folder: Path) -> EmbeddingRule:
    """As `POOLING_FILES` and config.json say. Raises ModelError for a pooling not computed here."""
    config = json_object(folder / POOLING_FILES[1])
    modes = {name.removeprefix(_MODE) for name, value in config.items() if value is True}
    modes = {str(config["pooling_mode"])} if "pooling_mode" in config else modes & _MODES
    if modes - set(_POOLINGS) or len(modes) > 1:
        named = ", ".join(sorted(modes))
        raise ModelError(
            f"the model's embeddings are pooled by {named}, which is not computed here"
        )
    modules = folder / POOLING_FILES[0]
    return EmbeddingRule(
        pooling=_POOLINGS[modes.pop()] if modes else "last",
        normalize=not modules.is_file() or b"Normalize" in modules.read_bytes(),
        size=_text_config(json_object(folder / "config.json")).get("hidden_size") or 0,
    )


def model_vocab_size(folder: Path) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens; 0: unknown."""
    return _text_config(json_object(folder / "config.json")).get("vocab_size") or 0


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text: `generation_config.json` first, as `generate` takes them."""
    config = json_object(folder / "config.json")
    for source in (json_object(folder / "generation_config.json"), _text_config(config), config):
        found = source.get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(found)
    token = json_object(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return () if token_id is None else (token_id,)


def _text_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Multi-modal models keep the settings for text in a section of their own."""
    nested = model_config.get("text_config")
    return nested if isinstance(nested, Mapping) else model_config
