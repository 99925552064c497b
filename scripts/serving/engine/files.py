"""The files of models and engines: their checksums, and whether there is room for more."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from serving.errors import ModelError

DISK_MARGIN_BYTES = 256 * 1024 * 1024


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises ModelError unless `folder` has room for `num_bytes` and a margin."""
    free = shutil.disk_usage(folder).free
    if num_bytes + DISK_MARGIN_BYTES > free:
        raise ModelError(
            f"{what} needs {human(num_bytes)} and a margin of {human(DISK_MARGIN_BYTES)}, but "
            f"{folder} has {human(free)} free",
            remedy="free some space, or link that folder to a larger disk",
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def human(num_bytes: float) -> str:
    """`269 MB`: decimal units, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"
