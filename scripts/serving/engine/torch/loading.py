"""A built engine folder becomes a model in memory, as fast as this device computes it.

Knows the kinds of weights (real, dummy, int8) and the packing of linear layers; does not know
steps, KV or sampling.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from serving.engine.torch.attention import NAME, attend_paged
from serving.engine.torch.attention_masks import learn_reaches
from serving.engine.torch.cpu import int8_weights, packed_linear
from serving.engine.torch.cpu import kernels as cpu_kernels
from serving.engine.torch.latent import keep_latents
from serving.engine.torch.rewrite.cpu_layer import rewrite_for_cpu
from serving.engine.torch.token_positions import give_positions
from serving.engine.torch.weights import dummy as dummy_weights
from serving.engine.torch.weights.multimodal.text_class import with_text_class
from serving.errors import ModelError, OperatorError
from serving.kv_layout import WEIGHT_ONLY_DTYPES, kv_dtype

log = logging.getLogger(__name__)


class TorchModel(NamedTuple):
    """`kernels` are the compiled CPU kernels of int8 engines, where they can be used."""

    model: Any
    kernels: cpu_kernels.CpuKernels | None


def load_model(engine_dir: Path, dtype: str, device: torch.device) -> TorchModel:
    """Load with paged attention, in evaluation mode, on `device`. Raises ModelError."""
    AttentionInterface.register(NAME, attend_paged)
    torch_dtype: torch.dtype = getattr(torch, kv_dtype(dtype))
    try:
        model = _read(engine_dir, dtype, torch_dtype, device)
    except OperatorError:
        raise
    except Exception as exc:  # transformers and safetensors raise whatever they meet
        raise ModelError(
            f"{engine_dir} does not load: {exc}", remedy="rebuild the engine folder"
        ) from exc
    model = model.eval().to(device)
    _fix_rotary_positions(model)
    if num_latents := keep_latents(model):
        log.info("%d attention modules keep latents", num_latents)
    kernels: cpu_kernels.CpuKernels | None = None
    if packed_linear.can_pack(device.type, torch_dtype):
        if dtype in WEIGHT_ONLY_DTYPES:
            kernels = cpu_kernels.load(engine_dir)
        log.info("packed %d linear layers", packed_linear.pack_linears(model, kernels))
        if dtype not in WEIGHT_ONLY_DTYPES:
            _leave_file(model)
    give_positions(model)
    learn_reaches(model)  # before rewriting, which keeps what attention is asked for
    if dtype in WEIGHT_ONLY_DTYPES:
        log.info("%s", rewrite_for_cpu(model))
    return TorchModel(model, kernels)


def _leave_file(model: torch.nn.Module) -> None:
    """Copy the weights that no layer has packed, which are few, so that the file can be unmapped.

    Otherwise the pages of all weights, read once for the packing, stay in memory beside the packed
    ones.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _read(engine_dir: Path, dtype: str, torch_dtype: torch.dtype, device: torch.device) -> Any:
    model: Any
    if dummy := dummy_weights.of_engine(engine_dir):
        model = dummy_weights.make_model(
            engine_dir, dummy.seed, device, torch_dtype, attention=NAME
        )
        if dtype in WEIGHT_ONLY_DTYPES:
            int8_weights.quantize(model)
    elif dtype in WEIGHT_ONLY_DTYPES:
        model = int8_weights.load(engine_dir, attention=NAME)
    else:
        config = AutoConfig.from_pretrained(engine_dir, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            engine_dir,
            config=with_text_class(config),
            dtype=torch_dtype,
            attn_implementation=NAME,
            local_files_only=True,
        )
    return model


def _fix_rotary_positions(model: Any) -> None:
    """Keep the frequencies that hold up to `context.model_max_len`.

    `dynamic` and `longrope` modules look at the positions of each step to choose others, which no
    step of ours reaches; the look alone would keep decode steps out of CUDA graphs.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")
        elif isinstance(kind, str):
            module.rope_type = "default"
