"""From a model to an engine for TensorRT-LLM, with tiny random models and a stand-in for its tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from integration.tiny_model import save_tiny_model
from safetensors.torch import load_file, save_file
from serving.config import Config, ModelConfig, parse
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest, load_manifest
from serving.engine.trtllm.build.engine_folder import build_engine
from serving.engine.trtllm.build.target import Host
from serving.errors import ConfigError, ModelError, OperatorError
from serving.gpus import Gpu
from unit.engine.trtllm.build.library_fakes import FakeRun

H200 = Host(gpus=[Gpu("NVIDIA H200", 90, 150 * 10**9)] * 2, driver="580.95.05")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def config(**raw: Any) -> Config:
    engine = {"backend": "tensorrt_llm", "device": "cuda", "dtype": "bfloat16", "block_size": 32}
    engine |= {"max_model_len": 512, **raw.pop("engine", {})}
    return parse({"engine": engine, **raw})


def built(
    model: Path,
    out: Path,
    *,
    run: FakeRun | None = None,
    host: Host = H200,
    settings: Config | None = None,
    roles: Any = ("prefill", "decode"),
    **source: Any,
) -> tuple[EngineManifest, list[str]]:
    lines: list[str] = []
    described = fetch_model(ModelConfig(id=str(model)), model.parent / "described", report=print)
    result = build_engine(
        msgspec.structs.replace(described, **source),
        out,
        config=settings or config(),
        roles=roles,
        fingerprint="f00d",
        run=run or FakeRun(),
        host=host,
        report=lines.append,
    )
    return result, lines


def test_manifest_describes_the_target_of_the_engine(model: Path, tmp_path: Path) -> None:
    engine, lines = built(model, tmp_path / "engine")
    assert load_manifest(tmp_path / "engine") == engine
    assert (engine.backend, engine.flow, engine.fingerprint) == ("tensorrt_llm", "pytorch", "f00d")
    assert engine.architecture == "LlamaForCausalLM"
    assert engine.stamp == {
        "tensorrt_llm": "1.2.1",
        "gpus": "NVIDIA H200",
        "compute_capability": "9.0",
        "driver": "580.95.05",
        "cuda": "13.0",
    }
    assert engine.check.kind == "checkpoint"
    assert engine.kv_layout is None
    assert (engine.model_max_len, engine.eos_token_ids, engine.pad_token_id) == (2048, [2], 0)
    assert engine.llm_args == {
        "prefill": "llm_args-prefill.yaml",
        "decode": "llm_args-decode.yaml",
    }
    assert any("room for about" in line for line in lines)


def test_folder_is_a_checkpoint_with_arguments_for_each_role(model: Path, tmp_path: Path) -> None:
    built(model, tmp_path / "engine")
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"),
        *("engine.json", "llm_args-prefill.yaml", "llm_args-decode.yaml"),
    }
    assert "llm_args-agg.yaml" not in names
    arguments = yaml.safe_load((tmp_path / "engine/llm_args-decode.yaml").read_text())
    assert (arguments["model"], arguments["dtype"]) == (".", "bfloat16")
    assert not list(tmp_path.glob(".*building"))


def test_weights_are_linked_and_the_rest_is_ours(model: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    built(model, tmp_path / "engine")
    engine = tmp_path / "engine"
    assert (engine / "model.safetensors").samefile(model / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert not (engine / name).samefile(model / name)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_links_are_symbolic_across_file_systems(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    built(model, tmp_path / "engine")
    link = tmp_path / "engine/model.safetensors"
    assert link.is_symlink()
    assert link.resolve() == (model / "model.safetensors").resolve()
    assert load_file(link)


def test_rebuilding_replaces_what_was_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/stale").touch()
    built(model, tmp_path / "engine")
    assert not (tmp_path / "engine/stale").exists()
    assert (model / "model.safetensors").exists()


def test_auto_context_is_resolved_by_the_build(model: Path, tmp_path: Path) -> None:
    engine, lines = built(
        model, tmp_path / "engine", settings=config(engine={"max_model_len": "auto"})
    )
    assert engine.max_model_len == engine.model_max_len
    arguments = (tmp_path / "engine" / engine.llm_args["decode"]).read_text()
    assert f"max_seq_len: {engine.model_max_len}" in arguments
    assert any("engine.max_model_len" in line for line in lines)


def test_a_build_that_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than"):
        built(model, tmp_path / "engine", settings=config(engine={"max_model_len": 4096}))
    assert not (tmp_path / "engine").exists()
    assert not list(tmp_path.glob(".*building"))


def test_other_formats_are_converted_and_compared(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    import torch

    torch.save(weights, model / "pytorch_model.bin")
    described = fetch_model(
        ModelConfig(id=str(model), allow_pickle=True), tmp_path / "described", report=print
    )
    out = tmp_path / "engine"
    engine = build_engine(
        described,
        out,
        config=config(),
        roles=("agg",),
        fingerprint="f00d",
        run=FakeRun(),
        host=Host(),
        report=print,
    )
    assert engine.check.kind == "logits"
    assert engine.kv_layout is not None
    assert engine.backend == "tensorrt_llm"
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


def test_linked_config_has_the_names_of_older_transformers_too(model: Path, tmp_path: Path) -> None:
    own = json.loads((model / "config.json").read_text())
    assert "rope_theta" not in own, "saved by transformers 5"
    built(model, tmp_path / "engine")
    content = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert content["rope_theta"] == own["rope_parameters"]["rope_theta"]
    assert json.loads((model / "config.json").read_text()) == own


def test_config_with_the_older_names_keeps_them(tmp_path: Path) -> None:
    from serving.engine.trtllm.build.staging import add_older_names

    path = tmp_path / "config.json"
    old = {"rope_theta": 10.0, "rope_scaling": {"rope_type": "yarn"}, "torch_dtype": "float16"}
    path.write_text(json.dumps(old))
    add_older_names(path)
    assert json.loads(path.read_text()) == old


def test_converted_config_has_the_names_of_older_transformers(model: Path, tmp_path: Path) -> None:
    from serving.engine.trtllm.build.staging import add_older_names

    path = tmp_path / "config.json"
    plain = {"rope_type": "default", "rope_theta": 100000.0}
    path.write_text(json.dumps({"dtype": "bfloat16", "rope_parameters": plain}))
    add_older_names(path)
    content = json.loads(path.read_text())
    assert (content["rope_theta"], content["rope_scaling"]) == (100000.0, None)
    assert content["torch_dtype"] == content["dtype"] == "bfloat16"
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    path.write_text(json.dumps({"rope_parameters": llama3}))
    add_older_names(path)
    content = json.loads(path.read_text())
    assert content["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert content["rope_parameters"] == llama3


def test_quantized_weights_keep_their_dtype(model: Path, tmp_path: Path) -> None:
    stated = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (model / "hf_quant_config.json").write_text(json.dumps(stated))
    built(model, tmp_path / "engine")
    arguments = yaml.safe_load((tmp_path / "engine/llm_args-decode.yaml").read_text())
    assert arguments["dtype"] == "auto"
    assert (tmp_path / "engine/hf_quant_config.json").exists()
    old = Host(gpus=[Gpu("NVIDIA A100", 80, 80 * 10**9)])
    with pytest.raises(ModelError, match=r"8\.9 or newer"):
        built(model, tmp_path / "engine", host=old)


def test_trtllm_build_makes_an_engine_for_each_division(model: Path, tmp_path: Path) -> None:
    settings = config(engine={"flow": "trtllm-build"}, workers={"tensor_parallel": {"prefill": 2}})
    run = FakeRun()
    engine, lines = built(model, tmp_path / "engine", run=run, settings=settings)
    assert engine.flow == "trtllm-build"
    assert len(run.commands) == 4
    assert "doing" in lines
    arguments = yaml.safe_load((tmp_path / "engine/llm_args-prefill.yaml").read_text())
    assert arguments["model"] == "trtllm-tp2-pp1"
    assert (tmp_path / "engine" / arguments["model"] / "rank1.engine").exists()


def test_trtllm_build_with_a_later_version_is_refused(model: Path, tmp_path: Path) -> None:
    settings = config(engine={"flow": "trtllm-build"})
    with pytest.raises(ConfigError, match=r"1\.3\.0rc27 has no trtllm-build"):
        built(model, tmp_path / "engine", run=FakeRun("1.3.0rc27"), settings=settings)


def test_too_little_memory_is_refused_before_loading(model: Path, tmp_path: Path) -> None:
    small = Host(gpus=[Gpu("NVIDIA small", 90, 10**9)])
    with pytest.raises(OperatorError, match="each prefill worker needs about"):
        built(model, tmp_path / "engine", host=small)


def test_salt_differs_where_kv_does(model: Path, tmp_path: Path) -> None:
    salts = {
        built(model, tmp_path / "engine", settings=settings)[0].hash_salt
        for settings in (
            config(),
            config(engine={"dtype": "float16"}),
            config(tensorrt_llm={"kv_cache_dtype": "fp8"}),
        )
    }
    assert len(salts) == 3
    again = built(model, tmp_path / "engine")[0]
    assert again.hash_salt in salts
    weights = load_file(model / "model.safetensors")
    save_file({name: t * 2 for name, t in weights.items()}, model / "model.safetensors")
    assert built(model, tmp_path / "engine")[0].hash_salt not in salts


def test_changed_model_files_are_refused(model: Path, tmp_path: Path) -> None:
    described = fetch_model(ModelConfig(id=str(model)), tmp_path / "described", report=print)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="has changed"):
        build_engine(
            described,
            tmp_path / "engine",
            config=config(),
            roles=("agg",),
            fingerprint="f00d",
            run=FakeRun(),
            host=Host(),
            report=print,
        )
