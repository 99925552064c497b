"""The language model of a multimodal checkpoint: which weights it has, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.models.row import Row
from benchmarks.models.rows.multimodal import ROWS
from benchmarks.models.run_row import save_tokenizer
from benchmarks.models.small_multimodal import small_multimodal_of
from safetensors.torch import load_file, save_file
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest, ModelManifest
from serving.engine.torch.build import build_engine
from serving.engine.torch.build_check.engine_answers import Case
from serving.engine.torch.build_check.serving_check import reference
from serving.engine.torch.weights import shards
from serving.engine.torch.weights.multimodal import extract
from serving.engine.torch.weights.multimodal.outer_model import OuterModel
from serving.errors import ModelError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3nConfig,
    Qwen3VLConfig,
)


def row(name: str) -> Row:
    return next(each for each in ROWS if each.name == name)


def save(folder: Path, name: str = "LLaVA 1.5") -> Path:
    """The small checkpoint of a row, with the names that it has on the hub."""
    small_multimodal_of(row(name).config, folder, seed=1)
    save_tokenizer(folder)
    return folder


def build(
    model: Path, out: Path, text_only: Any = "auto", **engine: Any
) -> tuple[EngineManifest, list[str]]:
    lines: list[str] = []
    fetched = fetch_model(
        ModelConfig(id=str(model)),
        out / "fetched",
        report=lines.append,
        weights=engine.get("weights", "real"),
    )
    # The mock engine packs the same weights, without the check of a small model.
    fast = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "backend": "mock"}
    options = fast | engine
    built = build_engine(
        fetched, out / "engine", engine=EngineConfig(**options), fingerprint="f",
        report=lines.append, text_only=text_only,
    )  # fmt: skip
    return built, lines


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_engine_is_a_text_checkpoint_and_says_what_it_left_out(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    built, lines = build(model, tmp_path)
    assert built.architecture == "LlamaForCausalLM"
    assert built.text_of is not None
    assert built.text_of.architecture == "LlavaForConditionalGeneration"
    assert built.text_of.left_out == ["model.vision_tower", "model.multi_modal_projector"]
    assert any("text only" in line and "model.vision_tower" in line for line in lines)
    assert built.check.kind == "same_files"  # the bytes went through no other dtype
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    kept = weights_of(tmp_path / "engine")
    source = weights_of(model)
    language = {
        name.removeprefix("language_model."): tensor
        for name, tensor in source.items()
        if name.startswith("language_model.")
    }
    assert kept.keys() == language.keys()
    assert all(torch.equal(kept[name], language[name]) for name in kept)
    assert not list(tmp_path.glob("*-text*"))


def test_no_tensor_of_an_encoder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "model")
    read: list[str] = []
    opened = extract._open

    class Spy:
        def __init__(self, reader: Any) -> None:
            self._reader = reader

        def __getattr__(self, name: str) -> Any:
            return getattr(self._reader, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self._reader.get_tensor(name)

    monkeypatch.setattr(
        extract, "_open", lambda *given: {k: Spy(v) for k, v in opened(*given).items()}
    )
    build(model, tmp_path)
    assert read
    assert all(name.startswith("language_model.") for name in read)


def test_other_dtype_is_converted_from_the_text_alone(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Qwen3-VL")
    built, _ = build(model, tmp_path, dtype="bfloat16")
    assert built.check.kind == "logits"
    assert {each.dtype for each in weights_of(tmp_path / "engine").values()} == {torch.bfloat16}
    assert built.architecture == "Qwen3VLForCausalLM"


def test_int8_engine_of_a_text_class_of_our_own(tmp_path: Path) -> None:
    built, _ = build(save(tmp_path / "model", "Qwen3-VL"), tmp_path, dtype="int8")
    assert built.dtype == "int8"


def test_large_language_models_come_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    model = save(tmp_path / "model")
    build(model, tmp_path)
    engine = tmp_path / "engine"
    index = json.loads((engine / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(engine.glob("*.safetensors"))) > 1
    assert index["weight_map"].keys() == weights_of(engine).keys()


def test_fused_experts_are_made_as_the_multimodal_class_makes_them(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Qwen3-VL (MoE)")
    # transposed on the hub
    build(model, tmp_path)
    engine = AutoModelForCausalLM.from_pretrained(tmp_path / "engine")
    outer = AutoModelForMultimodalLM.from_pretrained(model)
    ours = dict(engine.model.named_parameters())
    theirs = dict(outer.model.language_model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_stay_apart_when_the_text_class_fuses_them_itself() -> None:
    outer = OuterModel(row("Kimi K2.5").config)
    name = "language_model.model.layers.3.mlp.experts.7.gate_proj.weight"
    meaning = outer.meaning(name)
    assert meaning.converter is None
    assert meaning.text_name == "model.layers.3.mlp.experts.7.gate_proj.weight"
    assert outer.meaning("language_model.lm_head.weight").text_name == "lm_head.weight"
    assert outer.meaning("vision_tower.encoder.blocks.0.norm0.weight").text_name is None


def test_missing_weights_of_the_language_model_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    weights = weights_of(model)
    del weights["language_model.model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights: model\.layers\.1\.mlp\.down_proj"):
        build(model, tmp_path)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    weights = weights_of(model)
    weights["model.language_model.norm.weight"] = weights["language_model.model.norm.weight"] + 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="are the same weight"):
        build(model, tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_config_decides(equal: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "model", "SmolVLM")
    config = json.loads((model / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    weights = weights_of(model)
    if equal:
        weights["lm_head.weight"] = weights["model.text_model.embed_tokens.weight"].clone()
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    build(model, tmp_path)
    written = AutoConfig.from_pretrained(tmp_path / "engine")
    assert written.tie_word_embeddings is equal
    assert ("lm_head.weight" in weights_of(tmp_path / "engine")) is not equal


def test_outer_config_says_which_tokens_are_special() -> None:
    config = row("Gemma 3 (images)").config
    config.eos_token_id, config.text_config.eos_token_id = [1, 106], 1
    outer = OuterModel(config)
    assert outer.text_config.eos_token_id == [1, 106]
    assert config.text_config.eos_token_id == 1  # the config itself stays as it is
    assert OuterModel(Qwen3VLConfig()).text_config.eos_token_id is None


def test_multimodal_models_are_refused_on_request(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    with pytest.raises(ModelError, match="it is multimodal") as failure:
        build(model, tmp_path, text_only=False)
    assert "model.text_only" in failure.value.remedy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PaliGemma", "attend to later ones as well"),
        ("Llama 3.2 Vision", "no class for its language model alone"),
    ],
)
def test_text_that_cannot_be_served_alone_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as failure:
        OuterModel(row(name).config).require_text_model()
    assert failure.value.remedy


def test_a_text_model_unlike_the_multimodal_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the multimodal class does more to text than its language model and a head do."""
    model = save(tmp_path / "model", "Qwen3-VL")
    around = OuterModel.around

    def scaled(self: OuterModel, text_model: Any) -> Any:
        outer = around(self, text_model)
        outer.lm_head.register_forward_hook(lambda *given: given[2] * 1.1)
        return outer

    monkeypatch.setattr(OuterModel, "around", scaled)
    with pytest.raises(ModelError, match="as transformers does"):
        build(model, tmp_path, backend="torch")


def test_text_passes_encoders_whose_library_is_not_here() -> None:
    """Gemma 3n computes embeddings of images for text too, and uses none of them."""
    text = {
        "vocab_size": 256, "vocab_size_per_layer_input": 256, "hidden_size": 64,
        "hidden_size_per_layer_input": 16, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    outer = OuterModel(Gemma3nConfig(text_config=text))
    outer.require_text_model()
    assert outer.text_of.left_out[:2] == ["model.vision_tower", "model.audio_tower"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(outer.text_config, dtype=torch.float32).eval()
    case = Case("text", torch.randint(1, 256, (30,)).tolist(), 4)
    alone, whole = reference(model, case), reference(outer.around(model), case)
    torch.testing.assert_close(whole.logits, alone.logits)


def test_dummy_weights_have_the_shape_of_the_language_model(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Qwen3-VL")
    (model / "model.safetensors").unlink()
    built, _ = build(model, tmp_path, weights="dummy")
    assert built.dummy_weights is not None
    assert built.text_of is not None
    assert built.architecture == "Qwen3VLForCausalLM"


def test_other_formats_than_safetensors_are_refused(tmp_path: Path) -> None:
    manifest = ModelManifest(
        id="m", source="local", revision=None, commit=None, format="pickle", files=[],
        path=str(tmp_path), created=0,
    )  # fmt: skip
    outer = OuterModel(row("LLaVA 1.5").config)
    with pytest.raises(ModelError, match="its weights are pickle"):
        extract.extract_text(manifest, outer, tmp_path, [].append)
