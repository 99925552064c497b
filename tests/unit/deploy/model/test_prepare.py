"""A person's own model: described in place, offline, and noticed when it changes."""

import os
from pathlib import Path

import pytest
from serving.config import ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import load_model
from serving.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def fetch(folder: Path, out: Path, **limits: int) -> list[str]:
    lines: list[str] = []
    fetch_model(ModelConfig(id=str(folder)), out, report=lines.append, **limits)
    return lines


def test_a_local_model_stays_where_it_is(folder: Path, tmp_path: Path) -> None:
    lines = fetch(folder, tmp_path / "out")
    manifest = load_model(tmp_path / "out" / "model.json")
    assert (manifest.source, manifest.path, manifest.commit) == ("local", str(folder), None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.json"]
    assert any("network is not touched" in line for line in lines)


def test_a_local_model_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(folder, tmp_path / "out")


def test_large_files_are_identified_by_size_and_time(folder: Path, tmp_path: Path) -> None:
    fetch(folder, tmp_path / "out", hash_up_to_bytes=5)
    files = {file.path: file for file in load_model(tmp_path / "out" / "model.json").files}
    assert files["config.json"].sha256 is not None
    weights = files["model.safetensors"]
    assert weights.sha256 is None
    assert weights.mtime_ns == os.stat(folder / "model.safetensors").st_mtime_ns


def test_empty_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is empty"):
        fetch(folder, tmp_path / "out")


def test_file_that_only_looks_like_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        fetch(tmp_path / "x.gguf", tmp_path / "out")


def test_damaged_manifest_says_which_rule_recreates_it(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"id": ')
    with pytest.raises(ModelError, match="is damaged") as failure:
        load_model(tmp_path / "model.json")
    assert "download_model" in failure.value.remedy


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointer_of_git_lfs_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=rf"{name} is a pointer of git-lfs") as failure:
        fetch(folder, tmp_path / "out")
    assert "lfs pull" in failure.value.remedy


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("chat_template.jinja", "{{ messages }}\n{% for m in %}"),
        ("tokenizer_config.json", '{"chat_template": "a\\n{% if %}"}'),
    ],
)
def test_template_that_cannot_be_read_is_refused_before_a_build(
    file: str, text: str, folder: Path, tmp_path: Path
) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match="chat template cannot be read, line 2"):
        fetch(folder, tmp_path / "out")
