"""A model that another program fetched is used, and only when it is whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants
from serving.config import ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import ModelManifest
from serving.errors import ModelError

COMMIT = "c" * 40


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As huggingface_hub writes it: links in snapshots, blobs named by their checksums."""
    folder = tmp_path / "hub" / "models--org--tiny"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    weights = b"weights" * 1000
    files = {
        "config.json": (b"{}", blob_id(b"{}")),
        "tokenizer.json": (b"{ }", blob_id(b"{ }")),
        "model.safetensors": (weights, hashlib.sha256(weights).hexdigest()),
    }
    for name, (content, digest) in files.items():
        (folder / "blobs" / digest).write_bytes(content)
        (folder / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{digest}")
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def fetch(out: Path, **config: str) -> ModelManifest:
    return fetch_model(ModelConfig(id="org/tiny", **config), out, report=[].append)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_cached_model_is_served_offline(
    variable: str, revision: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    manifest = fetch(tmp_path / "out", revision=revision)
    assert (manifest.commit, manifest.source) == (COMMIT, "hub")
    assert (tmp_path / "out/files/model.safetensors").read_bytes() == b"weights" * 1000


def test_model_that_is_not_cached_is_refused_offline_in_words(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"v2 is not in the hub's cache .* TRANSFORMERS_OFFLINE"):
        fetch(tmp_path / "out", revision="v2")


def test_damaged_blob_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blob = (cache / "snapshots" / COMMIT / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors of org/tiny is damaged"):
        fetch(tmp_path / "out")
