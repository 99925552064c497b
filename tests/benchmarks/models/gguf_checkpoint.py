"""Writes a checkpoint as a GGUF file, with the keys and the order of numbers that people's files have.

The weights of the reference are those that the file holds, rounded as it rounds them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from benchmarks.models.checkpoint import Checkpoint
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

Array = np.ndarray[Any, Any]
Config = dict[str, Any]

ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gemma")},
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "falcon": "falcon",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "starcoder2": "starcoder2",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
}
_PIECES = {"phi3", "gemma2", "gemma3", "gemma"}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_GGUF_NAMES = {
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "feed_forward_length": ("intermediate_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}


def as_gguf(kind: str) -> Callable[[Path], Checkpoint]:
    """A form: matrices in `kind` where their rows are long enough for it, else in F16."""

    def apply(folder: Path) -> Checkpoint:
        path = folder.with_name("model.gguf")
        _write(folder, path, Kind[kind])
        return Checkpoint(path, folder)

    return apply


def _write(folder: Path, path: Path, kind: Kind) -> None:
    config: Config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for key, names in _GGUF_NAMES.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    _add_positions(writer, architecture, config)
    _add_tokenizer(writer, architecture, config["vocab_size"])
    weights = {
        name: tensor.float().numpy()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    if architecture in {"gemma", "gemma2"}:  # they have no place for a head of their own
        del weights["lm_head.weight"]
        tied = config | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(tied))
    rounded = _add_weights(writer, architecture, config, weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(rounded[name])) for name in weights}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


# --- positions ------------------------------------------------------------------------------------


def _add_positions(writer: gguf.GGUFWriter, architecture: str, config: Config) -> None:
    rope: Config = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        _add(writer, f"{architecture}.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if not rope:
        return
    width = config["hidden_size"] // config["num_attention_heads"]
    size = config.get("head_dim") or width
    turning = int(size * rope.get("partial_rotary_factor", 1.0))
    _add(writer, f"{architecture}.rope.freq_base", float(rope["rope_theta"]))
    if architecture in {"llama", "phi3"}:
        _add(writer, f"{architecture}.rope.dimension_count", turning)
    kind = rope["rope_type"]
    if kind in {"linear", "yarn"}:
        _add(writer, f"{architecture}.rope.scaling.type", kind)
        _add(writer, f"{architecture}.rope.scaling.factor", float(rope["factor"]))
    original = rope.get("original_max_position_embeddings")
    if original and kind != "llama3":  # which has its tensor instead
        _add(writer, f"{architecture}.rope.scaling.original_context_length", original)
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, size))
    if kind == "longrope":
        ratio = config["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        _add(writer, f"{architecture}.rope.scaling.attn_factor", attention)
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)


def _llama3_factors(rope: Config, size: int) -> Array:
    factors = []
    original = rope["original_max_position_embeddings"]
    for exponent in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / size)
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (original / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


# --- tokens ---------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, architecture: str, vocab_size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if architecture in _PIECES:
        tokens = ["<unk>", "<s>", "</s>", *alphabet][:vocab_size]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(vocab_size)])
        writer.add_token_types([2, 3, 3] + [1] * (vocab_size - 3))
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    else:
        tokens = alphabet
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre({"llama": "llama-bpe", "gpt2": "gpt-2"}.get(architecture, "qwen2"))
        writer.add_token_types([1] * vocab_size)
        writer.add_token_merges([])
    writer.add_token_list(tokens)


# --- weights --------------------------------------------------------------------------------------


def _add_weights(
    writer: gguf.GGUFWriter,
    architecture: str,
    config: Config,
    weights: dict[str, Array],
    kind: Kind,
) -> dict[str, Array]:
    """Returns the weights that the file holds, under their old names."""
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.get("num_hidden_layers") or config["n_layer"],
    )
    rounded: dict[str, Array] = {}
    experts: dict[str, list[str]] = {}
    for name, values in weights.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}_proj", []).append(name)
            continue
        there, back = _order(architecture, config, name)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ValueError(f"GGUF has no name for {name} of {architecture}")
        rounded[name] = back(_add_tensor(writer, stored, there(values), kind))
    for name, parts in experts.items():
        parts.sort(key=lambda part: int(part.removeprefix(name.rsplit(".", 1)[0]).split(".")[1]))
        stacked = np.stack([weights[part] for part in parts])
        held = _add_tensor(writer, f"{names.get_name(name)}.weight", stacked, kind)
        rounded |= {part: held[index] for index, part in enumerate(parts)}
    return rounded


def _order(
    architecture: str, config: Config, name: str
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """How numbers of a tensor are written, and how that is undone."""
    if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        return (
            lambda w: w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape),
            lambda w: w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape),
        )
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return (lambda w: w + np.float32(1), lambda w: w - np.float32(1))
    if architecture == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight", name):
        return (lambda w: w.T, lambda w: w.T)
    if name.endswith("shared_expert_gate.weight"):
        return (lambda w: w[0], lambda w: w[None])
    return (lambda w: w, lambda w: w)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Array, kind: Kind) -> Array:
    """Returns what can be read again."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    row, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.ndim == 1 or "gate_inp" in name or name.startswith("position"):
        writer.add_tensor(name, values)
        return values
    if kind == Kind.F16 or values.shape[-1] % row:
        half = values.astype(np.float16)
        writer.add_tensor(name, half)
        return half.astype(np.float32)
    packed = _random_q4_k(values) if kind == Kind.Q4_K else gguf.quants.quantize(values, kind)
    writer.add_tensor(name, packed, raw_dtype=kind)
    return gguf.quants.dequantize(packed, kind)


def _random_q4_k(values: Array) -> Array:
    """Blocks of 256 random numbers as large as `values`: two scales, 8 x (scale, minimum), 4 bits.

    The `gguf` package reads this kind but does not write it.
    """
    random = np.random.default_rng(values.size)
    count = values.size // 256
    scale = np.full((count, 1), float(values.std()) / 190, dtype=np.float16)
    both = np.concatenate([scale, scale * np.float16(7.5)], axis=1).view(np.uint8)
    six = random.integers(20, 64, size=(count, 8), dtype=np.uint8)
    low, high = six[:, :4], six[:, 4:]
    first = low | ((high >> 4) << 6)
    packed = np.concatenate([first, first, (high & 15) | ((high & 15) << 4)], axis=1)
    fours = random.integers(0, 256, size=(count, 128), dtype=np.uint8)
    blocks = np.concatenate([both, packed, fours], axis=1)
    return blocks.reshape(*values.shape[:-1], -1)
