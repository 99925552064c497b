"""A quantized checkpoint becomes a plain one in the engine's dtype, weight by weight.

Names and shapes are then those of the unquantized model, so that everything else reads it like one.
No more than one weight and one shard of the result are in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from serving.engine.files import require_space
from serving.engine.manifest import ModelFile, ModelManifest
from serving.engine.torch.weights.quantized.base import FP8_DTYPES, REMEDY, QuantizedForm
from serving.engine.torch.weights.shards import write_shards
from serving.errors import ModelError
from serving.progress import Report

if TYPE_CHECKING:
    from serving.engine.torch.weights.shards import NamedTensors


class _StoredTensor(NamedTuple):
    file: str
    name: str


def unpack_checkpoint(
    manifest: ModelManifest, form: QuantizedForm, target: Path, dtype: torch.dtype, report: Report
) -> ModelManifest:
    """Write the weights of `manifest` to the empty folder `target` in `dtype`, with config.json.

    Raises ModelError: weights of another format, damaged or incomplete ones, or no room.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(manifest.path)
    if manifest.format != "safetensors":
        raise ModelError(
            f"the torch engine reads {form.label} weights from safetensors, not {manifest.format}",
            remedy="save the model as safetensors, or use another copy of it",
        )
    names = [file.path for file in manifest.files if file.path.endswith(".safetensors")]
    try:
        with contextlib.ExitStack() as opened:
            readers = {
                name: opened.enter_context(safe_open(source / name, framework="pt"))
                for name in names
            }
            weights = _weights(readers, form)
            names_in = (name for reader in readers.values() for name in reader.keys())  # noqa: SIM118
            if any(map(form.is_for_activations, names_in)):
                report("activations and KV are not quantized here: their scales are left out")
            packed = sum(len(parts) > 1 or "weight" not in parts for parts in weights.values())
            report(
                f"unpacking {packed} {form.label} weights to {str(dtype).removeprefix('torch.')}"
            )
            require_space(target, _size(readers, weights, dtype), "the unpacked model")
            written = write_shards(_unpacked(readers, weights, form, dtype), target)
    except SafetensorError as exc:
        raise ModelError(f"the weights are damaged: {exc}", remedy=REMEDY) from exc
    config = json.loads((source / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps(without_quantization(config), indent=2) + "\n")
    files = [ModelFile(name, (target / name).stat().st_size) for name in ["config.json", *written]]
    # `hub`: the files are ours, so that they may be linked.
    return msgspec.structs.replace(manifest, source="hub", path=str(target), files=files)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the unquantized model."""
    return {
        key: without_quantization(value) if key == "text_config" and value else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _weights(
    readers: Mapping[str, Any], form: QuantizedForm
) -> dict[str, dict[str, _StoredTensor]]:
    """The parts of each weight by the weight's name; a plain weight has the one part `weight`."""
    weights: dict[str, dict[str, _StoredTensor]] = {}
    plain: dict[str, _StoredTensor] = {}
    for file, reader in readers.items():
        for name in reader.keys():  # noqa: SIM118
            if form.is_for_activations(name):
                continue
            place = form.part_of(name)
            if place is None:
                plain[name] = _StoredTensor(file, name)
            else:
                weights.setdefault(place.weight, {})[place.part] = _StoredTensor(file, name)
    if twice := weights.keys() & plain.keys():
        name = min(twice)
        raise ModelError(f"{name} is there quantized and plain", remedy=REMEDY)
    return weights | {name: {"weight": stored} for name, stored in plain.items()}


def _unpacked(
    readers: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, _StoredTensor]],
    form: QuantizedForm,
    dtype: torch.dtype,
) -> NamedTensors:
    for name, stored in weights.items():
        parts = {part: readers[each.file].get_tensor(each.name) for part, each in stored.items()}
        is_plain = parts.keys() == {"weight"} and (name in {s.name for s in stored.values()})
        if not is_plain and form.is_packed(parts):
            yield name, _as_weight(form, name, parts).to(dtype)
        elif not is_plain:
            raise ModelError(f"{name} lacks parts: there are {', '.join(parts)}", remedy=REMEDY)
        elif _is_zero_bias(name, parts["weight"], weights):
            continue
        else:
            yield name, _plain(name, parts["weight"], dtype)


def _as_weight(form: QuantizedForm, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    try:
        return form.unpack(parts)
    except KeyError as exc:
        raise ModelError(f"{name} lacks its {exc.args[0]}", remedy=REMEDY) from exc
    except ModelError as exc:
        raise ModelError(f"{name}: {str(exc).splitlines()[0]}", remedy=exc.remedy) from exc
    except (RuntimeError, ValueError, IndexError, AssertionError) as exc:
        first = str(exc).partition("\n")[0]
        raise ModelError(f"{name} is not what {form.label} means: {first}", remedy=REMEDY) from exc


def _is_zero_bias(
    name: str, tensor: torch.Tensor, weights: Mapping[str, Mapping[str, _StoredTensor]]
) -> bool:
    """Some tools store a bias of zeros with every packed weight, also where the model has none."""
    packed = weights.get(f"{name.removesuffix('.bias')}.weight", {})
    return name.endswith(".bias") and len(packed) > 1 and not tensor.any()


def _plain(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype in FP8_DTYPES:
        raise ModelError(f"{name} is FP8 and has no scale", remedy=REMEDY)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _size(
    readers: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, _StoredTensor]],
    dtype: torch.dtype,
) -> int:
    """Bytes of the result, at most: four bits are the least that a number takes."""
    total = 0
    for stored in weights.values():
        for each in stored.values():
            shape = readers[each.file].get_slice(each.name)
            numbers = {"U8": 2, "I32": 8}.get(shape.get_dtype(), 1) if len(stored) > 1 else 1
            total += torch.Size(shape.get_shape()).numel() * numbers * dtype.itemsize
    return total
