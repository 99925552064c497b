"""Quantized checkpoints become plain ones, with the numbers that the quantized ones stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.models.quantizers import QUANTIZED_FORMS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving.engine.manifest import ModelFile, ModelManifest
from serving.engine.torch.weights.quantized.select import quantized_form
from serving.engine.torch.weights.quantized.unpack import unpack_checkpoint
from serving.errors import ModelError

RECORDED = Path(__file__).parent / "recorded.safetensors"
with safe_open(RECORDED, framework="pt") as recorded:
    CASES = [case for case in recorded.metadata() if case != "versions"]


def manifest_of(folder: Path, format: Any = "safetensors") -> ModelManifest:
    files = [ModelFile(path.name, path.stat().st_size) for path in folder.iterdir()]
    return ModelManifest(
        id="a/model", source="local", revision=None, commit=None, format=format, files=files,
        path=str(folder), created=0,
    )  # fmt: skip


def unpack(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    form = quantized_form(folder)
    assert form is not None
    target = folder.with_name("plain")
    target.mkdir()
    plain = unpack_checkpoint(manifest_of(folder), form, target, dtype, lambda _: None)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert quantized_form(target) is None
    return load_file(Path(plain.path) / "model.safetensors")


def save(folder: Path, quantization: dict[str, Any], **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    config = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    named = {k if "." in k else k.replace("__", "."): tensor for k, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", [name for name in QUANTIZED_FORMS if name != "HQQ"])
def test_weights_are_what_the_quantized_ones_stand_for(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    if name == "MXFP4":
        tensors = {"m__gate_up_proj": torch.randn(2, 64, 96, generator=generator)}
    else:
        # Of 96 inputs, the last block of 24 or 64 is whole, and of 64 outputs it is not.
        tensors = {"m__q_proj__weight": torch.randn(64, 96, generator=generator)}
    folder = save(tmp_path / "model", {}, norm__weight=torch.ones(4), **tensors)
    checkpoint = QUANTIZED_FORMS[name](folder)
    assert checkpoint is not None
    expected = load_file(checkpoint.reference / "model.safetensors")
    found = unpack(checkpoint.path)
    assert found.keys() == expected.keys()
    for weight, tensor in expected.items():
        torch.testing.assert_close(found[weight], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_formats_own_libraries_make_of_them(case: str, tmp_path: Path) -> None:
    with safe_open(RECORDED, framework="pt") as opened:
        config = json.loads(opened.metadata()[case])
        prefix = f"{case}/packed/"
        packed = {
            name.removeprefix(prefix): opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }
        expected = opened.get_tensor(f"{case}/unpacked")
    found = unpack(save(tmp_path / "model", config, **packed))
    assert found.keys() == {"m.weight"}
    torch.testing.assert_close(found["m.weight"], expected, rtol=1e-6, atol=1e-6)


def test_everything_gets_the_engines_dtype_and_integers_stay(tmp_path: Path) -> None:
    fp8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
    folder = save(
        tmp_path / "model",
        {"quant_method": "fp8"},
        m__weight=fp8,
        m__weight_scale_inv=torch.tensor(0.5),
        m__input_scale=torch.ones(1),
        norm__weight=torch.ones(4),
        ids=torch.arange(3),
    )
    found = unpack(folder, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "m.weight": torch.bfloat16,
        "norm.weight": torch.bfloat16,
        "ids": torch.int64,
    }
    assert found["m.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("quantization", "tensors", "reason"),
    [
        ({"quant_method": "fp8"}, {"m__weight": "fp8"}, "FP8 and has no scale"),
        (
            {"quant_method": "fp8", "weight_block_size": [2, 2]},
            {"m__weight": "fp8", "m__weight_scale_inv": (3, 2)},
            r"\[3, 2\] do not fit a weight of \[4, 4\]",
        ),
        ({"quant_method": "awq"}, {"m__qweight": "int32", "m__scales": (4, 8)}, "lacks its qzeros"),
        (
            {"quant_method": "mxfp4"},
            {"m__w": (2, 2), "m__w_blocks": "uint8", "m__w_scales": "uint8"},
            "quantized and plain",
        ),
    ],
)
def test_incomplete_and_contradictory_weights_are_refused(
    quantization: dict[str, Any], tensors: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    types = {"fp8": torch.float8_e4m3fn, "int32": torch.int32, "uint8": torch.uint8}
    made = {
        name: torch.ones(4, 4).to(types[kind]) if isinstance(kind, str) else torch.ones(kind)
        for name, kind in tensors.items()
    }
    with pytest.raises(ModelError, match=reason) as failure:
        unpack(save(tmp_path / "model", quantization, **made))
    assert failure.value.remedy


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        ("fp8", "weight_scale_inv"),
        ("modelopt", "weight_scale"),
        ("compressed-tensors", "weight_scale"),
    ],
)
def test_scales_that_are_bytes_are_exponents(method: str, scale: str, tmp_path: Path) -> None:
    """MXFP8: a scale for each 32 numbers, 2 ** (byte - 127)."""
    exponents = torch.tensor([[120, 127], [128, 130]], dtype=torch.uint8)
    fp8 = torch.ones(2, 64).to(torch.float8_e4m3fn)
    tensors = {"m__weight": fp8, f"m__{scale}": exponents}
    found = unpack(save(tmp_path / "model", {"quant_method": method}, **tensors))["m.weight"]
    expected = torch.tensor([[2.0**-7, 1.0], [2.0, 8.0]]).repeat_interleave(32, 1)
    assert torch.equal(found, expected)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"quant_method": "gptq", "bits": 4})
    form = quantized_form(folder)
    assert form is not None
    with pytest.raises(ModelError, match="GPTQ weights from safetensors, not pytorch"):
        unpack_checkpoint(
            manifest_of(folder, "pytorch"), form, tmp_path, torch.float32, lambda _: None
        )


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "hqq"}, r"quantized \(hqq\)"),
        ({"quant_method": "awq", "version": "gemv"}, "not 4 bits in `gemv`"),
        ({"quant_method": "gptq", "bits": 5}, "not 5 bits"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            "sparse",
        ),
        ({"quant_method": "auto-round", "packing_format": "auto_round:awq"}, "auto-round"),
    ],
)
def test_other_forms_are_refused_with_what_is_read(
    quantization: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as failure:
        quantized_form(save(tmp_path / "model", quantization))
    assert "copy in" in failure.value.remedy


def test_modelopts_own_file_states_a_form_when_it_names_an_algorithm(tmp_path: Path) -> None:
    stated = tmp_path / "hf_quant_config.json"
    assert quantized_form(tmp_path) is None
    for algorithm, label in ((None, None), ("NVFP4", "ModelOpt")):
        stated.write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
        form = quantized_form(tmp_path)
        assert (form and form.label) == label
    stated.write_text("[]")
    with pytest.raises(ModelError, match="is damaged"):
        quantized_form(tmp_path)
