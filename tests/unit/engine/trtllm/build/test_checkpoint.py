"""Which checkpoints TensorRT-LLM can load, decided without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.engine.trtllm.build.checkpoint import (
    ARCHITECTURES,
    CONVERTERS,
    Checkpoint,
    read_checkpoint,
    require_loadable,
)
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError, ModelError
from serving.protocol import Role
from unit.engine.trtllm.build.checkpoints import LLAMA, shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shard(tmp_path / "model.safetensors", 1000)
    return tmp_path


def described(folder: Path, **config: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    return read_checkpoint(folder)


def require(
    checkpoint: Checkpoint,
    version: str = "1.2.1",
    flow: Any = "pytorch",
    **spreads: tuple[int, int],
) -> None:
    parallelism: dict[Role, Parallelism] = {
        role: Parallelism(*spread)  # type: ignore[misc]
        for role, spread in (spreads or {"agg": (1, 1)}).items()
    }
    require_loadable(checkpoint, version=parse_version(version), flow=flow, parallelism=parallelism)


def test_sizes_come_from_config_and_tensors(folder: Path) -> None:
    found = read_checkpoint(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert found.kv_width == 2 * 2 * 8  # keys and values, KV heads, head size
    assert found.weight_bytes == 1000
    assert found.weight_bytes_as("bfloat16") == 1000
    assert found.weight_bytes_as("float32") == 2000


def test_stated_head_size_and_older_dtype_name_are_used(folder: Path) -> None:
    found = described(folder, head_dim=128, dtype=None, torch_dtype="float16")
    assert found.kv_width == 2 * 2 * 128
    assert found.stored_dtype == "float16"


def test_a_size_for_each_layer_is_read_as_the_largest(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"intermediate_size": [128, 256]}
    path.write_text(json.dumps(config))
    assert read_checkpoint(folder).intermediate_size == 256


def test_missing_kv_heads_are_as_many_as_heads(folder: Path) -> None:
    assert described(folder, num_key_value_heads=None).num_kv_heads == 8


def test_latent_attention_has_one_vector_for_all_heads(folder: Path) -> None:
    found = described(
        folder, architectures=["DeepseekV3ForCausalLM"], kv_lora_rank=512, qk_rope_head_dim=64
    )
    assert (found.num_kv_heads, found.kv_width) == (0, 576)
    require(found, agg=(8, 1))


def test_all_shards_of_an_index_are_counted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    shard(folder / names["a"], 10)
    with pytest.raises(ModelError, match="1 missing files: model-00002-of-00002"):
        read_checkpoint(folder)
    shard(folder / names["b"], 20)
    assert read_checkpoint(folder).weight_bytes == 30


@pytest.mark.parametrize("cut", [1, 500, 995, 1010, 1100])
def test_truncated_weights_are_refused(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 64])
def test_file_of_another_format_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_checkpoint(folder)


def test_folder_without_weights_or_config_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot read"):
        read_checkpoint(folder)


def test_multimodal_config_has_no_usable_sizes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"text_config": LLAMA, "vision_config": {}}))
    with pytest.raises(ModelError, match="text model"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "BertForSequenceClassification", ""])
def test_unknown_architecture_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"TensorRT-LLM 1\.2\.1 has no"):
        require(described(folder, architectures=[name]))


def test_architecture_of_a_later_version_names_that_version(folder: Path) -> None:
    found = described(folder, architectures=["Glm4MoeForCausalLM"])
    with pytest.raises(ModelError, match=r"lists it from 1\.2 on"):
        require(found, "1.1.0")
    require(found, "1.2.1")


def test_what_converters_know_the_pytorch_backend_knows() -> None:
    assert set(CONVERTERS) <= set(ARCHITECTURES)


def test_trtllm_build_supports_fewer_architectures(folder: Path) -> None:
    found = described(folder, architectures=["Gemma3ForCausalLM"])
    require(found)
    with pytest.raises(ConfigError, match=r"engine\.flow"):
        require(found, flow="trtllm-build")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_heads_can_be_divided_or_shared(folder: Path, size: int) -> None:
    require(read_checkpoint(folder), agg=(size, 1))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_indivisible_heads_name_the_role_and_what_would_do(folder: Path, role: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require(read_checkpoint(folder), **{role: (3, 1)})
    assert caught.value.key == "workers.tensor_parallel"
    assert role in caught.value.what
    assert caught.value.remedy == "choose one of 1, 2, 4, 8"


def test_more_groups_than_layers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        require(read_checkpoint(folder), decode=(1, 5))
    assert caught.value.key == "workers.pipeline_parallel"
    assert "4 or less" in caught.value.remedy
