"""Which files make a model."""

import json
from pathlib import Path

import pytest
from serving.config import ModelConfig
from serving.deploy.model.files import local_files, select_files
from serving.engine.files import human, require_space
from serving.errors import ConfigError, ModelError


def choose(*names: str, allow_pickle: bool = False) -> list[str]:
    return select_files(names, read=no_file, where="m", allow_pickle=allow_pickle)[1]


def no_file(name: str) -> bytes:
    raise AssertionError(f"{name} was read")


def index_of(*shards: str) -> bytes:
    return json.dumps(
        {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    ).encode()


def test_takes_weights_and_companions_and_nothing_else() -> None:
    present = ["config.json", "tokenizer.json", "model.safetensors", "optimizer.pt", "README.md"]
    assert choose(*present) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_prefers_safetensors_even_when_pickle_is_allowed() -> None:
    names = choose("config.json", "model.safetensors", "pytorch_model.bin", allow_pickle=True)
    assert names == ["config.json", "model.safetensors"]


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("stem", ["model-", "model.safetensors-", "anything."])
def test_the_index_names_the_shards(stem: str) -> None:
    shards = [f"{stem}0000{i}-of-00002.safetensors" for i in (1, 2)]
    present = ["config.json", INDEX, *shards, "consolidated.safetensors"]
    kind, names = select_files(
        present, read=lambda name: index_of(*shards), where="m", allow_pickle=False
    )
    assert (kind, names) == ("safetensors", sorted(["config.json", INDEX, *shards]))


def test_missing_shards_are_named_before_anything_is_fetched() -> None:
    with pytest.raises(ModelError, match=r"names 1 missing files: b\.safetensors"):
        select_files(
            ["config.json", INDEX, "a.safetensors"],
            read=lambda name: index_of("a.safetensors", "b.safetensors"),
            where="m",
            allow_pickle=False,
        )


def test_damaged_index_is_refused() -> None:
    with pytest.raises(ModelError, match="is damaged"):
        select_files(["config.json", INDEX], read=lambda name: b"{", where="m", allow_pickle=False)


@pytest.mark.parametrize(
    ("tokenizer", "reason"), [("README.md", "no tokenizer"), ("tekken.json", r"tekken\.json is of")]
)
def test_model_without_a_tokenizer_that_is_read_is_refused(tokenizer: str, reason: str) -> None:
    present = ["config.json", "model.safetensors", tokenizer]

    def select(needed: bool) -> list[str]:
        return select_files(
            present, read=no_file, where="m", allow_pickle=False, needs_tokenizer=needed
        )[1]

    with pytest.raises(ModelError, match=reason) as failure:
        select(True)
    assert "`model.tokenizer`" in failure.value.remedy
    assert "bundled" not in failure.value.remedy  # which would be another model's
    assert select(False) == ["config.json", "model.safetensors"]


def test_chat_template_is_taken_in_every_form() -> None:
    templates = ["chat_template.jinja", "chat_template.json", "processor_config.json"]
    assert set(templates) <= set(choose("config.json", "model.safetensors", *templates))


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
