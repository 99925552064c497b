"""Are the weights of an engine those that were built? Their SHA-256 is in `engine.json`.

Every byte is read once for each identity of a file (inode, size, times) since the machine booted;
the build counts. So whatever a program changed is found at the next start of a worker, and whatever
the disk changed by itself at the first start after a boot.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import msgspec

from serving.engine.files import sha256_of
from serving.engine.manifest import EngineManifest, load_manifest, load_model
from serving.errors import ModelError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD = ".verified.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def verify_weights(engine_dir: Path, manifest: EngineManifest) -> None:
    """Raises ModelError for a file that is missing or not as it was built. `engine.json` is then
    removed, so that the next run builds the engine again. Only the torch engine's weights are
    in its folder."""
    if manifest.backend != "torch":
        return
    hashes = {name: it for name, it in manifest.weights.items() if _SHA256.fullmatch(it)}
    descriptor = os.open(engine_dir, os.O_RDONLY)
    try:
        fcntl.flock(
            descriptor, fcntl.LOCK_EX
        )  # workers start side by side: one reads, the rest wait
        verified = _read_record(engine_dir)
        for name, sha256 in hashes.items():
            path = engine_dir / name
            if not path.is_file():
                raise _damaged(engine_dir, f"{path} is gone")
            if verified.get(name) == _identity(path):
                continue
            if sha256_of(path) != sha256:
                raise _damaged(engine_dir, f"{path} is not what was built: its checksum differs")
        note_verified(engine_dir, list(hashes))
    finally:
        os.close(descriptor)


def note_verified(engine_dir: Path, names: list[str]) -> None:
    """The files are known to be as `engine.json` says. A folder that takes no file costs only time."""
    record = {name: _identity(engine_dir / name) for name in names}
    try:
        (engine_dir / _RECORD).write_bytes(msgspec.json.encode(record))
    except OSError:
        return


def remove_unusable(engine_dir: Path, model_file: Path) -> list[Path]:
    """Remove manifests that cannot be used, so that Snakemake makes them anew; returns them."""
    removed = []
    if model_file.exists():
        try:
            load_model(model_file)
        except ModelError:
            model_file.unlink()
            removed.append(model_file)
    engine_file = engine_dir / "engine.json"
    if engine_file.exists():
        try:
            manifest = load_manifest(engine_dir)
        except ModelError:
            manifest = None
        if manifest is None or manifest.fingerprint != engine_dir.name:
            engine_file.unlink()
            removed.append(engine_file)
    return removed


def _damaged(engine_dir: Path, what: str) -> ModelError:
    (engine_dir / "engine.json").unlink(missing_ok=True)
    return ModelError(
        what,
        remedy="run the same target again: it builds the engine anew; if this returns, "
        "examine the disk",
    )


def _read_record(engine_dir: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((engine_dir / _RECORD).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def _identity(path: Path) -> str:
    stat = path.stat()
    boot = _BOOT_ID.read_text().strip()
    return f"{boot} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
