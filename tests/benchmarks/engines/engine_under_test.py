"""Finds the engine that the benchmarks measure: the newest in `results/`, or the default one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serving.engine.manifest import load_manifest
from serving.errors import ModelError

ROOT = Path(__file__).resolve().parents[3]


def find_engine(chosen: Path | None, dtype: str = "float32") -> Path:
    """`chosen`, or the newest torch engine of that `engine.dtype` in `results/engines`; when there
    is none, it is built of the default model."""
    if chosen is not None:
        return chosen
    if not _built(dtype):
        print(f"no {dtype} engine in results/engines: building one", file=sys.stderr)
        command = [sys.executable, "-m", "snakemake", "build_engine", "--cores", "all"]
        options = ["--directory", str(ROOT), "--config", f"engine={{dtype: {dtype}}}"]
        subprocess.run([*command, *options], cwd=ROOT, stdout=sys.stderr, check=True)
    return _built(dtype)[-1]


def find_gguf() -> Path | None:
    """The downloaded GGUF file of the bundled model, for peers that read such files."""
    found = sorted((ROOT / "results" / "models").glob("*/files/*.gguf"))
    return found[0] if found else None


def _built(dtype: str) -> list[Path]:
    manifests = (ROOT / "results" / "engines").glob("*/engine.json")
    newest_last = sorted(manifests, key=lambda path: path.stat().st_mtime)
    return [path.parent for path in newest_last if _is_ours(path.parent, dtype)]


def _is_ours(folder: Path, dtype: str) -> bool:
    try:
        manifest = load_manifest(folder)
    except ModelError:  # of another version
        return False
    return (manifest.backend, manifest.dtype) == ("torch", dtype)
