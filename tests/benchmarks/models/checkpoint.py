"""What a form makes of a folder in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """`path` is what `model.id` names; `generate` runs on the folder `reference` (float32)."""

    path: Path
    reference: Path


Form = Callable[[Path], Checkpoint | None]
"""Changes the folder in place. Returns a checkpoint when `path` or `reference` is another place."""
