"""Weights from a source into an engine folder, in the engine's dtype, and proof that they are right.

Weights that have that dtype already are used as they are; others are converted and compared.
"""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.files import human, require_space
from serving.engine.manifest import BuildCheck, ModelManifest
from serving.engine.torch.build_check.serving_check import check_real_model, real_references
from serving.engine.torch.weights.logits_check import (
    compare,
    require_layout,
    run_prompts,
    tokenized_prompts,
)
from serving.engine.torch.weights.source import Source, load_model
from serving.errors import ModelError
from serving.host_memory import host_memory
from serving.kv_layout import DTYPE_BYTES, WEIGHT_ONLY_DTYPES, KvLayout, kv_dtype
from serving.progress import Report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_INTEGER_DTYPES = {"BOOL", "U8", "I8", "I16", "I32", "I64"}


def pack_weights(
    source: Source, staging: Path, dtype: str, layout: KvLayout, report: Report
) -> BuildCheck:
    """Write config.json and the weights in `dtype` beside the tokenizer in `staging`.

    Raises ModelError: damaged or missing weights, no room, or a result unlike its source.
    """
    if stored_dtypes(source.manifest) == {_SAFETENSORS_DTYPES.get(dtype)}:
        return _reuse_weights(source, staging, layout, report)
    return _convert_weights(source, staging, dtype, layout, report)


def stored_dtypes(manifest: ModelManifest) -> set[str]:
    """The safetensors dtypes of the source's weights; empty for other formats."""
    from safetensors import SafetensorError, safe_open

    if manifest.format != "safetensors":
        return set()
    dtypes = set()
    for file in manifest.files:
        if file.path.endswith(".safetensors"):
            try:
                with safe_open(Path(manifest.path) / file.path, framework="pt") as opened:
                    dtypes |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as exc:
                raise ModelError(
                    f"{file.path} is damaged: {exc}", remedy="fetch or copy the model again"
                ) from exc
    return dtypes - _INTEGER_DTYPES


def _reuse_weights(source: Source, staging: Path, layout: KvLayout, report: Report) -> BuildCheck:
    """The source's files as they are: linked when they are ours, copied when they are a person's."""
    import torch

    report(f"the weights are {layout.dtype} already; using them as they are")
    names = [file.path for file in source.manifest.files if "safetensors" in file.path]
    size = sum((source.folder / name).stat().st_size for name in names)
    _require_memory(size, "checking")
    if source.manifest.source == "local":
        require_space(staging, size, "the engine")
    for name in ["config.json", *names]:
        _place(source.folder / name, staging / name, link=source.manifest.source != "local")
    model = load_model(
        staging,
        source.config,
        getattr(torch, layout.dtype),
        source.manifest.id,
        local_files_only=True,
    )
    require_layout(model, layout)
    prompts = tokenized_prompts(staging)
    positions = sum(len(logits) for logits in run_prompts(model, prompts))
    references = real_references(source.reference_model(model), prompts)
    del model
    gc.collect()
    check_real_model(staging, layout.dtype, references, report)
    return BuildCheck(
        kind="same_files",
        num_positions=positions,
        max_abs_diff=0.0,
        argmax_agreement=1.0,
        tolerance=0.0,
    )


def _place(source: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


def _convert_weights(
    source: Source, staging: Path, dtype: str, layout: KvLayout, report: Report
) -> BuildCheck:
    """Load in float32, save in `dtype`, load again and compare; never two models in memory."""
    import torch

    num_weights = _count_weights(source.config)
    _require_memory(4 * num_weights, "converting")
    require_space(staging, DTYPE_BYTES[kv_dtype(dtype)] * num_weights, "the engine")
    report(f"converting {num_weights / 1e6:.0f} million weights to {dtype}")
    model = source.load(torch.float32)
    require_layout(model, layout)
    prompts = tokenized_prompts(staging)
    expected = run_prompts(model, prompts)
    references = real_references(source.reference_model(model), prompts)
    _save(model, staging, dtype, report)
    del model
    gc.collect()
    report("comparing the packed model with its source")
    packed = _load_packed(source, staging, dtype)
    check = compare(expected, run_prompts(packed, prompts), dtype)
    report(
        f"logits at {check.num_positions} positions: largest difference {check.max_abs_diff:.3g}, "
        f"same best token at {check.argmax_agreement:.0%}"
    )
    del packed
    gc.collect()
    check_real_model(staging, dtype, references, report)
    return check


def _load_packed(source: Source, staging: Path, dtype: str) -> PreTrainedModel:
    """As the engine will compute it, but for attention."""
    import torch

    if dtype not in WEIGHT_ONLY_DTYPES:
        return load_model(
            staging, source.config, torch.float32, source.manifest.id, local_files_only=True
        )
    from serving.engine.torch.cpu import int8_weights, packed_linear
    from serving.engine.torch.cpu import kernels as cpu_kernels

    model: Any = int8_weights.load(staging)
    if packed_linear.can_pack("cpu", torch.float32):
        packed_linear.pack_linears(model, cpu_kernels.load(staging))
    packed: PreTrainedModel = model
    return packed


def _save(model: PreTrainedModel, staging: Path, dtype: str, report: Report) -> None:
    import torch
    from transformers import GenerationConfig

    # Left behind by GGUF loading; saving refuses a model that says it is quantized.
    loaded: Any = model
    loaded.hf_quantizer, loaded.is_quantized = None, False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # Our own file follows; a model's may hold values that saving refuses.
    empty: Any = GenerationConfig
    loaded.generation_config = empty()
    if dtype in WEIGHT_ONLY_DTYPES:
        from serving.engine.torch.cpu import int8_weights
        from serving.engine.torch.cpu import kernels as cpu_kernels

        share = int8_weights.quantize(model)
        report(f"{share:.0%} of the weights are in linear layers and now {dtype}")
        int8_weights.save(model, staging)
        cpu_kernels.build(staging, report)
    else:
        loaded.to(getattr(torch, dtype)).save_pretrained(staging)


def _count_weights(config: PreTrainedConfig) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _require_memory(num_bytes: int, what: str) -> None:
    available = host_memory().available
    if num_bytes > 0.9 * available:
        raise ModelError(
            f"{what} this model takes {human(num_bytes)} of memory, {human(available)} are free",
            remedy="build on a larger machine"
            + (
                ", or set `engine.dtype` to what the weights are in" if what == "converting" else ""
            ),
        )
