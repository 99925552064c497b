"""Weights that are not those that were built are never served, and what is damaged is built again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import pytest
from integration.tiny_model import save_tiny_model
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine import integrity
from serving.engine.integrity import remove_unusable, verify_weights
from serving.engine.manifest import load_manifest
from serving.engine.torch.build import build_engine
from serving.errors import ModelError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `described/model.json` and `engines/f00d`."""
    folder = tmp_path_factory.mktemp("built")
    model = save_tiny_model(folder / "model")
    source = fetch_model(ModelConfig(id=str(model)), folder / "described", report=[].append)
    engine = EngineConfig(device="cpu", dtype="float32")
    out = folder / "engines" / "f00d"
    build_engine(source, out, engine=engine, fingerprint="f00d", report=[].append)
    return folder


@pytest.fixture
def engine_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "engines" / "f00d", tmp_path / "f00d"))


def flip(path: Path, *, keep_times: bool = False) -> None:
    """One bit, in place."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_weights_are_read_once_for_each_identity(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, reads = load_manifest(engine_dir), []
    whole = integrity.sha256_of
    monkeypatch.setattr(integrity, "sha256_of", lambda path: reads.append(path) or whole(path))
    for _ in range(3):
        verify_weights(engine_dir, manifest)
    assert len(reads) == len(manifest.weights) > 0


def test_build_counts_as_a_reading(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    verify_weights(original / "engines" / "f00d", load_manifest(original / "engines" / "f00d"))


@pytest.mark.parametrize("keep_times", [False, True])
def test_flipped_bit_is_refused_and_the_engine_is_built_again(
    keep_times: bool, engine_dir: Path
) -> None:
    manifest = load_manifest(engine_dir)
    verify_weights(engine_dir, manifest)
    flip(engine_dir / next(iter(manifest.weights)), keep_times=keep_times)
    with pytest.raises(ModelError, match="its checksum differs") as failure:
        verify_weights(engine_dir, manifest)
    assert "builds the engine anew" in failure.value.remedy
    assert not (engine_dir / "engine.json").exists()  # what Snakemake goes by


def test_missing_weights_are_named(engine_dir: Path) -> None:
    manifest = load_manifest(engine_dir)
    (engine_dir / next(iter(manifest.weights))).unlink()
    with pytest.raises(ModelError, match="is gone"):
        verify_weights(engine_dir, manifest)


def test_damaged_source_is_not_built(original: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(original / "model", tmp_path / "model"))
    source = fetch_model(ModelConfig(id=str(model)), tmp_path / "described", report=[].append)
    for file in source.files:  # as on a disk that rots: neither size nor time tells
        if file.path.endswith(".safetensors"):
            flip(model / file.path, keep_times=True)
    engine = EngineConfig(device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="is damaged: its checksum"):
        build_engine(source, tmp_path / "x", engine=engine, fingerprint="x", report=[].append)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"f00d"', b'"beef"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"format": ', b'"format": 9')),
    ],
)
def test_engine_that_cannot_be_used_is_forgotten(change, engine_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    absent = tmp_path / "model.json"
    assert remove_unusable(engine_dir, absent) == []
    change(engine_dir / "engine.json")
    assert remove_unusable(engine_dir, absent) == [engine_dir / "engine.json"]
    assert not (engine_dir / "engine.json").exists()


def test_damaged_description_of_a_model_is_forgotten(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes((original / "described" / "model.json").read_bytes())
    assert remove_unusable(tmp_path / "none", path) == []
    path.write_bytes(msgspec.json.encode({"id": 3}))
    assert remove_unusable(tmp_path / "none", path) == [path]
