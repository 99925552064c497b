"""Whether TensorRT-LLM can load a checkpoint, from its JSON and safetensors headers alone.

The library itself fails only after minutes of loading, or loads a quantized checkpoint as if it
were not quantized. Sources: the tables of architectures in its documentation
(docs/source/models/supported-models.md, of 1.0.0, of the stable release and of 1.3.0rc13; those it
runs by AutoDeploy alone are left out) and `ModelConfig` in tensorrt_llm/_torch/model_config.py.
What quantizations need of a GPU is in `quantization`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from serving.engine.manifest import Flow
from serving.engine.trtllm.build.quantization import Quantization, read_quantization
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.versions import Version
from serving.errors import ConfigError, ModelError
from serving.kv_layout import DTYPE_BYTES
from serving.protocol import Role

ARCHITECTURES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(
        (
            *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "DeciLMForCausalLM"),
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"),
            *("DeepseekV3ForCausalLM", "Exaone4ForCausalLM", "Phi3ForCausalLM"),
            *("NemotronForCausalLM", "NemotronNASForCausalLM"),
        ),
        (1, 0),
    ),
    "GptOssForCausalLM": (1, 1),
    **dict.fromkeys(
        (
            *("DeepseekV32ForCausalLM", "ExaoneMoEForCausalLM", "Glm4MoeForCausalLM"),
            *("MiniMaxM2ForCausalLM", "NemotronHForCausalLM", "Qwen3NextForCausalLM"),
        ),
        (1, 2),
    ),
    **dict.fromkeys(
        ("Cohere2ForCausalLM", "GlmMoeDsaForCausalLM", "Qwen3_5MoeForCausalLM"), (1, 3)
    ),
}
"""Text models of the PyTorch backend, and the release line whose documentation first lists them."""

CONVERTERS: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen",
    "Phi3ForCausalLM": "phi",
}
"""For `trtllm-build`: the folder of examples/models/core whose convert_checkpoint.py is meant."""


class Checkpoint(Struct, frozen=True, kw_only=True):
    """The shape in config.json, and the number of bytes of the weights.

    `kv_width` is the number of elements that one token adds to KV in one layer: keys and values of
    all KV heads, or the one latent of MLA (`num_kv_heads` is 0 then, as it is not divided).
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    kv_width: int
    vocab_size: int
    model_max_len: int
    stored_dtype: str
    weight_bytes: int
    quantization: Quantization | None

    def weight_bytes_as(self, dtype: str) -> int:
        """Once loaded in `dtype`; quantized weights stay as they are."""
        if self.quantization is not None or self.stored_dtype not in DTYPE_BYTES:
            return self.weight_bytes
        return self.weight_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[self.stored_dtype]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder. Raises ModelError: no config, missing or truncated shards."""
    path = folder / "config.json"
    config = _read_json(path)
    architectures = config.get("architectures") or [""]
    heads = _number(config, "num_attention_heads", path)
    hidden = _number(config, "hidden_size", path)
    latent = config.get("kv_lora_rank")
    kv_heads = 0 if latent else int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    width = latent + config.get("qk_rope_head_dim", 0) if latent else 2 * kv_heads * head_dim
    return Checkpoint(
        architecture=architectures[0],
        num_layers=_number(config, "num_hidden_layers", path),
        hidden_size=hidden,
        intermediate_size=_largest(config.get("intermediate_size")) or 4 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        kv_width=width,
        vocab_size=_number(config, "vocab_size", path),
        model_max_len=_number(config, "max_position_embeddings", path),
        stored_dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        weight_bytes=sum(_tensor_bytes(shard) for shard in _shards(folder)),
        quantization=read_quantization(folder, config),
    )


def require_loadable(
    checkpoint: Checkpoint,
    *,
    version: Version,
    flow: Flow,
    parallelism: Mapping[Role, Parallelism],
) -> None:
    """Raises ModelError or ConfigError with the first reason why the library cannot load it."""
    name = checkpoint.architecture
    since = ARCHITECTURES.get(name)
    if since is None:
        raise ModelError(
            f"TensorRT-LLM {version} has no {name or 'architecture of this name'} among the text "
            "models of its PyTorch backend",
            remedy="choose another model, or `engine.backend: torch` for a small one; its "
            "documentation lists what it runs (models/supported-models)",
        )
    if since > version.line:
        raise ModelError(
            f"TensorRT-LLM {version} does not run {name}: its documentation lists it from "
            f"{since[0]}.{since[1]} on",
            remedy="install that version, or set `container.base_tag` to an image of it",
        )
    if flow == "trtllm-build" and name not in CONVERTERS:
        raise ConfigError(
            "engine.flow",
            f"trtllm-build is driven here for {', '.join(CONVERTERS)}, and this is a {name}",
            remedy="remove `engine.flow`: the PyTorch backend runs it from its checkpoint",
        )
    for role, spread in parallelism.items():
        _require_divisible(checkpoint, role, spread)


def _require_divisible(checkpoint: Checkpoint, role: Role, spread: Parallelism) -> None:
    heads, kv_heads, size = checkpoint.num_heads, checkpoint.num_kv_heads, spread.tensor
    shared = not kv_heads or kv_heads % size == 0 or size % kv_heads == 0
    if heads % size or not shared:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        fits = [n for n in fits if not kv_heads or kv_heads % n == 0 or n % kv_heads == 0]
        raise ConfigError(
            "workers.tensor_parallel",
            f"{heads} attention heads over {kv_heads or 'shared'} KV heads cannot be divided among "
            f"{size} GPUs ({role})",
            remedy=f"choose one of {', '.join(map(str, fits))}",
        )
    if spread.pipeline > checkpoint.num_layers:
        raise ConfigError(
            "workers.pipeline_parallel",
            f"{checkpoint.num_layers} layers cannot be put on {spread.pipeline} groups of GPUs",
            remedy=f"set {role} to {checkpoint.num_layers} or less",
        )


def _shards(folder: Path) -> list[Path]:
    """All files that hold weights. Raises ModelError when the index names others."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise ModelError(
                f"{folder} has no model.safetensors", remedy="complete the model, or fetch it again"
            )
        return [single]
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        raise ModelError(
            f"{index} names {len(missing)} missing files: {', '.join(missing[:3]) or 'none at all'}",
            remedy="complete the model, or fetch it again",
        )
    return [folder / name for name in names]


def _tensor_bytes(path: Path) -> int:
    """Bytes of tensors in a safetensors file: 8 bytes of length, a JSON header, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        header = file.read(length) if 8 + length <= size else b""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        end = size  # so that it is called damaged
    if 8 + length + end != size:
        raise ModelError(
            f"{path} is damaged or cut short ({size} bytes)", remedy="fetch or copy the model again"
        )
    return int(end)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ModelError(
            f"cannot read {path}: {exc.strerror}", remedy="complete the model, or fetch it again"
        ) from exc
    except ValueError as exc:
        raise ModelError(
            f"{path} is damaged: {exc}", remedy="fetch or copy the model again"
        ) from exc
    return content if isinstance(content, dict) else {}


def _largest(value: Any) -> int:
    """Some families (Gemma 3n) have a list with a size for each layer."""
    return int(max(value, default=0) if isinstance(value, list) else value or 0)


def _number(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(
            f"{path} has no usable `{key}`",
            remedy="use a text model; the parts of a multimodal one are not served",
        )
    return value
