"""Which files make a model."""

from pathlib import Path

import pytest
from serving.config import ModelConfig
from serving.deploy.model.files import local_files, select_files
from serving.engine.files import human, require_space
from serving.errors import ConfigError, ModelError


def choose(*names: str, allow_pickle: bool = False) -> list[str]:
    return select_files(names, where="m", allow_pickle=allow_pickle)[1]


def test_takes_weights_and_companions_and_nothing_else() -> None:
    present = ["config.json", "tokenizer.json", "model.safetensors", "optimizer.pt", "README.md"]
    assert choose(*present) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_prefers_safetensors_even_when_pickle_is_allowed() -> None:
    names = choose("config.json", "model.safetensors", "pytorch_model.bin", allow_pickle=True)
    assert names == ["config.json", "model.safetensors"]


def test_sharded_weights_come_with_their_index() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    names = choose("config.json", index, *shards, "consolidated.safetensors")
    assert names == sorted(["config.json", index, *shards])


def test_variants_and_adapters_are_not_weights() -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors") as failure:
        choose("config.json", "model.fp16.safetensors", "adapter_model.safetensors")
    assert "adapter" in failure.value.remedy


def test_repository_of_gguf_files_points_to_them() -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as failure:
        choose("tiny.Q4.gguf", "README.md")
    assert ".gguf" in failure.value.remedy


def test_folder_with_a_single_gguf_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    found = local_files(ModelConfig(id=str(tmp_path)))
    assert (found.format, found.names) == ("gguf", ["tiny.gguf"])


def test_missing_path_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model\.id`: .* does not exist"):
        local_files(ModelConfig(id=str(tmp_path / "nothing")))


def test_piece_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    piece = tmp_path / "tiny-00001-of-00002.gguf"
    piece.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="split GGUF"):
        local_files(ModelConfig(id=str(piece)))


def test_other_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"not a `\.gguf`"):
        local_files(ModelConfig(id=str(tmp_path / "model.safetensors")))


def test_space_is_compared_with_what_is_free(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(ModelError, match="a lot needs 1000 TB"):
        require_space(tmp_path, 10**15, "a lot")


def test_sizes_read_as_people_write_them() -> None:
    assert [human(n) for n in (0, 999, 92_871_040, 2.5e9)] == ["0 B", "999 B", "92.9 MB", "2.5 GB"]
