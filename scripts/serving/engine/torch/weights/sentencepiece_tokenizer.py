"""A tokenizer that comes as a SentencePiece model: transformers converts it, this compares.

A conversion that differs is refused, since wrong tokens look like a bad model. Runs of spaces at
the start of a text are left out: transformers' own tokenizers have one space less there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.errors import ModelError

_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nassert add(19, 23) == ",
    "Grüße aus Köln, 東京から、🙂 1234567890!",
)
_REMEDY = "add a tokenizer.json, or set `model.tokenizer` to a folder that has one"


def find(folder: Path) -> Path | None:
    """The model's file, if it has one. Raises ModelError when it cannot be read."""
    path = next((folder / name for name in _NAMES if (folder / name).exists()), None)
    if path is not None:
        _processor(path)
    return path


def require_same(tokenizer: Any, path: Path) -> None:
    """Raises ModelError unless the converted `tokenizer` encodes as the file at `path` does."""
    original = _processor(path)
    for text in _TEXTS:
        if tokenizer.encode(text, add_special_tokens=False) != original.encode(text):
            raise ModelError(
                f"{path.name} cannot be converted to a tokenizer.json exactly", remedy=_REMEDY
            )


def _processor(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as exc:
        raise ModelError(
            f"the package sentencepiece, which reads {path.name}, is not installed",
            remedy="run `pip install sentencepiece`, or add a tokenizer.json to the model",
        ) from exc
    try:
        return SentencePieceProcessor(model_file=str(path))
    except RuntimeError as exc:
        raise ModelError(f"{path.name} is no SentencePiece model", remedy=_REMEDY) from exc
