"""What changes an engine's fingerprint, what `auto` means, and that asking is cheap."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving.config import Config, ModelConfig, parse
from serving.deploy.planning.device import resolve_device, resolve_dtype
from serving.deploy.planning.fingerprint import (
    engine_fingerprint,
    library_identity,
    model_key,
    resolve_source,
)
from serving.deploy.planning.machine import PACKAGES, Machine, this_machine
from serving.errors import ConfigError

VERSIONS = dict.fromkeys((*PACKAGES, "tensorrt_llm"), "1.2.0")
CPU = {"engine": {"device": "cpu"}}


def machine(**changes: Any) -> Machine:
    facts = {"has_gpu": False, "gpu_names": [], "driver": "", "versions": VERSIONS}
    return Machine(**{**facts, **changes})


def fingerprint(**sections: Any) -> str:
    engine = CPU["engine"] | sections.pop("engine", {})
    return engine_fingerprint(parse({"engine": engine, **sections}))


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"id": "org/other"}},
        {"model": {"revision": "main"}},
        {"model": {"source": "hub"}},
        {"engine": {"dtype": "bfloat16"}},
        {"engine": {"dtype": "int8"}},
        {"engine": {"block_size": 32}},
        {"engine": {"device": "cuda"}},
    ],
)
def test_fingerprint_changes_with_settings_that_change_the_engine(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) != fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"engine": {"max_batch_size": 64, "max_model_len": 128, "kv_cache_tokens": 4096}},
        {"engine": {"dtype": "float32"}},  # what `auto` means on a CPU
        {"model": {"name": "another"}},
        {"workers": {"decode": 3}},
        {"frontend": {"port": 9000}},
    ],
)
def test_fingerprint_ignores_settings_that_do_not_change_the_engine(
    changed: dict[str, Any],
) -> None:
    assert fingerprint(**changed) == fingerprint()


TRTLLM = {"backend": "tensorrt_llm"}


@pytest.mark.parametrize(
    "changed",
    [
        {"engine": TRTLLM | {"max_model_len": 128}},
        {"engine": TRTLLM | {"max_batch_size": 4}},
        {"engine": TRTLLM | {"max_num_batched_tokens": 64}},
        {"engine": TRTLLM | {"kv_cache_tokens": 4096}},
        {"engine": TRTLLM | {"flow": "trtllm-build"}},
        {"workers": {"tensor_parallel": {"decode": 2}}},
        {"workers": {"pipeline_parallel": {"prefill": 2}}},
        {"tensorrt_llm": {"free_gpu_memory_fraction": 0.5}},
        {"tensorrt_llm": {"llm_args": {"print_iter_log": True}}},
        {"kv_transfer": {"transport": "nixl"}},
        {"deployment": {"topology": "agg"}},
        {"container": {"runtime": "docker"}},
    ],
)
def test_tensorrt_llm_fingerprint_covers_the_arguments_of_its_library(
    changed: dict[str, Any],
) -> None:
    assert fingerprint(**({"engine": TRTLLM} | changed)) != fingerprint(engine=TRTLLM)


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": {"tensor_parallel": {"agg": 2}}},  # no role of this topology
        {"workers": {"decode": 3}},
        {"deployment": {"topology": "disagg"}},
        {"container": {"image": "unused"}},
        {"frontend": {"port": 9000}},
    ],
)
def test_tensorrt_llm_fingerprint_ignores_other_settings(changed: dict[str, Any]) -> None:
    assert fingerprint(engine=TRTLLM, **changed) == fingerprint(engine=TRTLLM)


@pytest.mark.parametrize(
    "changed",
    [
        {"tensorrt_llm": {"free_gpu_memory_fraction": 0.5}},
        {"engine": {"flow": "trtllm-build"}},
        {"deployment": {"topology": "agg"}},
        {"container": {"runtime": "docker"}},
        {"kv_transfer": {"transport": "tcp"}},
    ],
)
def test_torch_fingerprint_ignores_tensorrt_llm_settings(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) == fingerprint()


def test_tensorrt_llm_fingerprint_covers_library_gpu_and_driver() -> None:
    machines = [
        machine(),
        machine(versions=VERSIONS | {"tensorrt_llm": "1.2.1"}),
        machine(gpu_names=["NVIDIA H200"]),
        machine(driver="580.95.05"),
    ]
    config = parse({"engine": TRTLLM | {"device": "cuda"}})
    assert len({engine_fingerprint(config, each) for each in machines}) == 4


def test_image_is_identified_by_its_name_or_its_file(tmp_path: Path) -> None:
    def identity(**container: Any) -> list[Any]:
        config = parse({"container": {"runtime": "apptainer", **container}})
        return library_identity(config.container, machine())

    assert identity(image="nvcr.io/a:1") != identity(image="nvcr.io/a:2")
    assert identity(base_tag="1.2.0") != identity(base_tag="1.3.0")
    assert identity(image="a", base_tag="1.2.0") == identity(image="a", base_tag="1.3.0")
    image = tmp_path / "image.sif"
    image.write_bytes(b"one")
    before = identity(image=str(image))
    os.utime(image, ns=(1, 1))
    assert identity(image=str(image)) != before


def test_tensorrt_llm_means_cuda_unless_the_device_is_set() -> None:
    assert resolve_device(parse({"engine": TRTLLM}), machine()) == "cuda"
    assert resolve_dtype(parse({"engine": TRTLLM}), machine()) == "bfloat16"
    assert resolve_device(parse({"engine": TRTLLM | {"device": "cpu"}}), machine()) == "cpu"


def test_fingerprint_changes_with_library_versions() -> None:
    newer = machine(versions=VERSIONS | {"transformers": "99"})
    assert engine_fingerprint(Config(), machine()) != engine_fingerprint(Config(), newer)


def test_fingerprint_changes_with_the_files_of_a_local_model(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    before, key = fingerprint(model={"id": str(tmp_path)}), model_key(ModelConfig(id=str(tmp_path)))
    assert fingerprint(model={"id": str(tmp_path)}) == before
    os.utime(weights, ns=(1, 1))
    assert fingerprint(model={"id": str(tmp_path)}) != before
    assert model_key(ModelConfig(id=str(tmp_path))) != key


def test_dummy_weights_need_no_weights_and_give_another_engine(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    model, dummy = {"id": str(tmp_path)}, {"weights": "dummy"}
    real, before = fingerprint(model=model), fingerprint(model=model, engine=dummy)
    assert before != real
    weights.unlink()
    assert fingerprint(model=model, engine=dummy) == before
    tokenizer = tmp_path / "lent" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    lent = model | {"tokenizer": str(tokenizer.parent)}
    with_lent = fingerprint(model=lent, engine=dummy)
    assert with_lent != before
    os.utime(tokenizer, ns=(1, 1))
    assert fingerprint(model=lent, engine=dummy) != with_lent


def test_model_key_is_a_readable_folder_name() -> None:
    assert model_key(ModelConfig()).startswith("HuggingFaceTB--SmolLM2-135M-Instruct-")
    assert "/" not in model_key(ModelConfig(id="a/b", source="hub"))


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ({}, "bundled"),
        ({"revision": "main"}, "hub"),
        ({"source": "hub"}, "hub"),
        ({"id": "org/name"}, "hub"),
        ({"id": "./folder"}, "local"),
        ({"id": "~/x.gguf"}, "local"),
        ({"id": "folder", "source": "local"}, "local"),
    ],
)
def test_source_follows_from_the_model_id(model: dict[str, Any], source: str) -> None:
    assert resolve_source(ModelConfig(**model)) == source


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"id": "org/name", "source": "bundled"}, "model.source"),
        ({"id": "/folder", "revision": "main"}, "model.revision"),
        ({"id": "no such/id at/all"}, "model.id"),
    ],
)
def test_contradicting_model_settings_are_refused_by_key(model: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as failure:
        resolve_source(ModelConfig(**model))
    assert failure.value.key == key


def test_gpu_is_found_in_the_files_of_its_driver(tmp_path: Path) -> None:
    assert not this_machine(tmp_path).has_gpu
    for index in range(2):
        card = tmp_path / f"proc/driver/nvidia/gpus/0000:0{index}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    assert this_machine(tmp_path).has_gpu
    assert this_machine(tmp_path).gpu_names == ["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize(
    ("gpu", "torch", "device", "dtype"),
    [
        (False, "2.13.0", "cpu", "float32"),
        (True, "2.13.0", "cuda", "bfloat16"),
        (True, "2.13.0+cpu", "cpu", "float32"),
    ],
)
def test_auto_uses_a_gpu_that_torch_can_use(gpu: bool, torch: str, device: str, dtype: str) -> None:
    here = machine(has_gpu=gpu, versions=VERSIONS | {"torch": torch})
    assert (resolve_device(Config(), here), resolve_dtype(Config(), here)) == (device, dtype)


def test_int8_is_refused_where_a_gpu_would_be_used() -> None:
    here = machine(has_gpu=True, versions=VERSIONS | {"torch": "2.13.0"})
    with pytest.raises(ConfigError) as failure:
        resolve_dtype(parse({"engine": {"dtype": "int8"}}), here)
    assert failure.value.key == "engine.dtype"
    assert "engine.device: cpu" in failure.value.remedy
    assert resolve_dtype(parse({"engine": {"dtype": "int8", "device": "cpu"}}), here) == "int8"


def test_new_kernels_make_a_new_int8_engine(tmp_path: Path) -> None:
    int8 = parse({"engine": {"dtype": "int8", "device": "cpu"}})
    assert engine_fingerprint(int8, package=tmp_path) != engine_fingerprint(int8)
    assert engine_fingerprint(Config(), package=tmp_path) == engine_fingerprint(Config())


def test_fingerprint_imports_no_heavy_library() -> None:
    code = (
        "import sys; from serving.config import Config;"
        "from serving.deploy.planning.fingerprint import engine_fingerprint; engine_fingerprint(Config());"
        "print({'torch', 'transformers', 'huggingface_hub', 'httpx', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
