"""From a Hugging Face folder to an engine, with tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from integration.tiny_model import save_tiny_model
from safetensors.torch import load_file, save_file
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest, ModelManifest, load_manifest
from serving.engine.torch.build import build_engine
from serving.engine.torch.weights.logits_check import compare, require_layout
from serving.errors import ConfigError, ModelError
from serving.kv_layout import KvLayout
from serving.model_folder import embedding_rule
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def described(model: Path, **config: Any) -> ModelManifest:
    out = model.parent / "described"
    return fetch_model(ModelConfig(id=str(model), **config), out, report=[].append)


def built(
    model: Path, out: Path, dtype: str = "float32", **manifest: Any
) -> tuple[EngineManifest, list[str]]:
    lines: list[str] = []
    engine = EngineConfig(device="cpu", dtype=dtype)  # type: ignore[arg-type]
    source = msgspec.structs.replace(described(model), **manifest)
    result = build_engine(source, out, engine=engine, fingerprint="f00d", report=lines.append)
    return result, lines


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_manifest_describes_the_engine(model: Path, tmp_path: Path) -> None:
    engine, _ = built(model, tmp_path / "engine")
    assert load_manifest(tmp_path / "engine") == engine
    assert (engine.fingerprint, engine.architecture) == ("f00d", "LlamaForCausalLM")
    assert engine.kv_layout.block_shape == (2, 2, 16, 2, 16)
    assert engine.kv_layout.dtype == engine.dtype == "float32"
    assert (engine.model_max_len, engine.eos_token_ids, engine.pad_token_id) == (2048, [2], 0)
    assert set(engine.weights) == {"model.safetensors"}


def test_weights_of_the_right_dtype_are_used_as_they_are(model: Path, tmp_path: Path) -> None:
    engine, _ = built(model, tmp_path / "engine")
    packed = tmp_path / "engine" / "model.safetensors"
    assert engine.check.kind == "same_files"
    assert packed.read_bytes() == (model / "model.safetensors").read_bytes()
    # A person may go on writing to a folder of theirs, so it shares no storage with the engine.
    assert packed.stat().st_nlink == 1


def test_weights_from_the_hub_are_linked(model: Path, tmp_path: Path) -> None:
    built(model, tmp_path / "engine", source="hub", commit="c" * 40)
    assert (tmp_path / "engine" / "model.safetensors").stat().st_nlink == 2


def test_other_dtype_is_converted_and_compared(model: Path, tmp_path: Path) -> None:
    engine, lines = built(model, tmp_path / "engine", dtype="bfloat16")
    assert engine.check.kind == "logits"
    assert 0 < engine.check.max_abs_diff < engine.check.tolerance
    assert engine.check.num_positions > 30
    weights = load_file(tmp_path / "engine" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert any("largest difference" in line for line in lines)


def test_widening_loses_nothing(model: Path, tmp_path: Path) -> None:
    built(model, tmp_path / "narrow", dtype="bfloat16")
    (tmp_path / "narrow" / "engine.json").unlink()
    engine, _ = built(tmp_path / "narrow", tmp_path / "wide")
    assert (engine.check.kind, engine.check.max_abs_diff) == ("logits", 0.0)


def test_engine_loads_as_a_model_that_generates_like_the_source(
    model: Path, tmp_path: Path
) -> None:
    built(model, tmp_path / "engine")
    ids = torch.tensor([[5, 6, 7, 8]])
    answers = [
        AutoModelForCausalLM.from_pretrained(folder).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        for folder in (model, tmp_path / "engine")
    ]
    assert answers[0].tolist() == answers[1].tolist()


def test_pickled_weights_become_safetensors(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    manifest = described(model, allow_pickle=True)
    engine = EngineConfig(device="cpu", dtype="float32")
    build_engine(manifest, tmp_path / "e", engine=engine, fingerprint="f", report=[].append)
    packed = load_file(tmp_path / "e" / "model.safetensors")
    assert all(torch.equal(packed[name], weights[name]) for name in packed)
    assert not (tmp_path / "e" / "pytorch_model.bin").exists()


def test_every_token_that_ends_an_answer_is_recorded(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [0], "temperature": 0.6}')
    engine, _ = built(model, tmp_path / "engine")
    assert engine.eos_token_ids == [0, 2]  # the last one is the tokenizer's
    written = json.loads((tmp_path / "engine" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["temperature"]) == ([0, 2], 0.6)


def test_salt_follows_weights_dtype_and_model(model: Path, tmp_path: Path) -> None:
    salts = [
        built(model, tmp_path / "a")[0].hash_salt,
        built(model, tmp_path / "b", dtype="bfloat16")[0].hash_salt,
        built(model, tmp_path / "c", id="org/other")[0].hash_salt,
    ]
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    salts.append(built(model, tmp_path / "d")[0].hash_salt)
    assert len(set(salts)) == 4
    assert built(model, tmp_path / "e")[0].hash_salt == salts[3]


def test_missing_weights_are_refused(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights: model\.layers\.1\.mlp\.down_proj"):
        built(model, tmp_path / "engine")


def test_damaged_weights_are_refused(model: Path, tmp_path: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="damaged"):
        built(model, tmp_path / "engine")


def test_weights_that_compute_nan_are_refused(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        built(model, tmp_path / "engine")


def test_files_that_changed_since_the_download_are_refused(model: Path, tmp_path: Path) -> None:
    manifest = described(model)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    engine = EngineConfig(device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="has changed since download_model"):
        build_engine(manifest, tmp_path / "e", engine=engine, fingerprint="f", report=[].append)


def test_context_longer_than_the_models_is_refused(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", max_position_embeddings=512)
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=2048)
    manifest = described(model)
    with pytest.raises(ConfigError, match=r"engine\.max_model_len.*2048") as failure:
        build_engine(manifest, tmp_path / "e", engine=engine, fingerprint="f", report=[].append)
    assert "512" in failure.value.remedy
    auto = msgspec.structs.replace(engine, max_model_len="auto")
    built = build_engine(manifest, tmp_path / "e", engine=auto, fingerprint="f", report=[].append)
    assert built.model_max_len == 512


def test_rules_for_embeddings_are_kept(model: Path, tmp_path: Path) -> None:
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    built(model, tmp_path / "engine")
    rule = embedding_rule(tmp_path / "engine")
    assert (rule.pooling, rule.normalize) == ("mean", False)
    assert rule.size > 0


def test_unknown_architecture_is_refused(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", model_type="invented", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelError, match="does not know this model"):
        built(model, tmp_path / "engine")


def test_layout_that_config_misstates_is_refused(model: Path, tmp_path: Path) -> None:
    wrong = KvLayout.uniform(2, 2, 32, 16, "float32")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ModelError, match=r"\(2, 32\); its cache has 2 layers .* \(2, 16\)"):
        require_layout(loaded, wrong)


def test_failed_build_leaves_nothing_and_keeps_the_old_engine(model: Path, tmp_path: Path) -> None:
    before, _ = built(model, tmp_path / "engines" / "e")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        built(model, tmp_path / "engines" / "e", dtype="bfloat16")
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["e"]
    assert load_manifest(tmp_path / "engines" / "e") == before


def test_remains_of_a_killed_build_are_replaced(model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "e", tmp_path / ".e.building"):
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half")
    built(model, tmp_path / "e")
    assert not (tmp_path / ".e.building").exists()
    assert not (tmp_path / "e" / "model-00001-of-00002.safetensors").exists()


def test_engine_of_another_format_is_not_loaded(model: Path, tmp_path: Path) -> None:
    built(model, tmp_path / "engine")
    edit(tmp_path / "engine" / "engine.json", format=0)
    with pytest.raises(ModelError, match="built in format 0"):
        load_manifest(tmp_path / "engine")


def test_model_larger_than_memory_is_refused(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", intermediate_size=10**9)
    with pytest.raises(ModelError, match="converting this model takes 1"):
        built(model, tmp_path / "engine", dtype="bfloat16")


def test_difference_beyond_rounding_is_refused() -> None:
    logits = [torch.tensor([[1.0, 2.0, 10.0]])]
    assert compare(logits, [logits[0] + 0.04], "bfloat16").argmax_agreement == 1.0
    with pytest.raises(ModelError, match=r"differ by 1 from .* more than 0\.5"):
        compare(logits, [logits[0] + 1.0], "bfloat16")
    with pytest.raises(ModelError, match="report the model"):
        compare(logits, [logits[0] + 0.04], "float32")


@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "weight_zero_point"])
def test_tensors_that_say_how_to_read_weights_are_not_passed_over(
    name: str, model: Path, tmp_path: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.0.mlp.down_proj.{name}"] = torch.ones(1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"how to read its weights.*down_proj\.{name}"):
        built(model, tmp_path / "engine")


def test_template_in_a_file_of_its_own_becomes_the_engines(model: Path, tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    built(model, tmp_path / "engine")
    assert (tmp_path / "engine" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_shards_of_any_name_become_an_engine(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard_of = {tensor: names[i % 2] for i, tensor in enumerate(weights)}
    for name in names:
        part = {tensor: weights[tensor] for tensor in weights if shard_of[tensor] == name}
        save_file(part, model / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shard_of}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    engine, _ = built(model, tmp_path / "engine")
    assert set(engine.weights) == set(names)
