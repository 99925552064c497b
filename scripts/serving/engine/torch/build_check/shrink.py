"""A model of the same config, small enough to run in a moment: random weights, every feature kept.

Features are kept, sizes are not. Head size, rotary positions, scalings, caps, biases and norms stay
as they are; one layer of each kind remains; the windows become shorter than the prompts of a check.
What a key means is known by its usual names; a config with other names may come out invalid, and
then less of it is shrunk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

WINDOW = 20
"""Tokens in a shrunk window: not a multiple of any block."""
VOCAB_SIZE = 256
_CAP = 4.0
_INNER_SIZE = 96
_LARGEST_WEIGHTS = 200_000_000
_MAX_LAYERS = 8

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
# Other keys that hold the width, in the configs of some families.
_SAME_WIDTH = ("word_embed_proj_dim", "embedding_size", "attention_hidden_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_INNER = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    *("shared_intermediate_size", "dense_intermediate_size", "moe_layer_ffn_dim", "d_ff"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_experts_per_token",
    "moe_top_k",
)
_GROUPS = ("n_group", "num_expert_group", "n_groups")
_SPECIAL = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
)
# Layers of a kind come every so many layers, or from such a layer on.
_PERIODS = (
    *("sliding_window_pattern", "no_rope_layer_interval", "decoder_sparse_step"),
    *(
        "interleave_moe_layer_step",
        "full_attention_interval",
        "moe_layer_freq",
        "expert_layer_period",
    ),
    *("global_attn_every_n_layers", "layer_group_size"),
)
_OVERRIDES = "per_layer_config"  # by a layer's number: what it has otherwise than the others
_SHARING = "num_kv_shared_layers"  # so many of the last layers
_FIRST = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")


def small_model_of(config: PreTrainedConfig, folder: Path, seed: int) -> None:
    """Save a shrunk model of `config` with random weights (float32) to `folder`.

    Raises ModelError when no small model can be made of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    auto: Any = AutoModelForCausalLM
    failure: Exception | None = None
    for keep_width in (False, True):
        try:
            small = shrink(config, keep_width=keep_width)
            with torch.device("meta"):
                count = sum(each.numel() for each in auto.from_config(small).parameters())
            if count > _LARGEST_WEIGHTS:
                raise ValueError(f"it would have {count / 1e6:.0f} million weights")
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(seed)
                model = auto.from_config(small, dtype=torch.float32).eval()
                draw_weights(model)
        except Exception as exc:  # whatever a family's config and layers raise
            log.debug("no small model (keep_width=%s)", keep_width, exc_info=True)
            failure = failure or exc
            continue
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        return
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    raise ModelError(
        f"the torch engine cannot be checked for this model: no small one of its config can be made "
        f"({reason})",
        remedy="use `engine.backend: tensorrt_llm` on GPUs, or another model",
    ) from failure


def shrink(config: PreTrainedConfig, *, keep_width: bool = False) -> PreTrainedConfig:
    """The small config. `keep_width`: only fewer layers, a small vocabulary and short windows."""
    plain: dict[str, Any] = config.to_dict()
    plain.pop("quantization_config", None)
    # A tied head would see the last token's own embedding and little else.
    plain["tie_word_embeddings"] = False
    _shrink_layers(plain)
    _shrink_windows(plain)
    _shrink_vocabulary(plain)
    if not keep_width:
        _shrink_width(plain, config)
    return type(config).from_dict(plain)


# --- the parts of a config ------------------------------------------------------------------------


def _shrink_layers(plain: dict[str, Any]) -> None:
    """Keep leading layers: as many as it takes to see every kind, and two at least."""
    name = next((key for key in _LAYERS if isinstance(plain.get(key), int)), None)
    if name is None:
        return
    total: int = plain[name]
    lists = {
        key: value
        for key, value in plain.items()
        if isinstance(value, (list, tuple))
        and len(value) == total
        and total > 1
        and not _are_indices(value)
    }
    _spread_layers(plain, lists, total)
    for key in _FIRST:
        if isinstance(first := plain.get(key), int) and first > 1:
            plain[key] = 1
            lists = {k: [*v[:1], *v[first:]] for k, v in lists.items()}
    kinds = [tuple(str(value[i]) for value in lists.values()) for i in range(_length(lists, total))]
    picked = [i for i in range(len(kinds)) if kinds[i] not in kinds[:i]]
    periods = [plain[k] for k in _PERIODS if isinstance(plain.get(k), int) and plain[k] > 1]
    least = max([2, *(period for period in periods if period <= _MAX_LAYERS)])
    if picked[-1] < _MAX_LAYERS:
        picked = list(range(max(picked[-1] + 1, least)))
    else:
        picked = sorted({*picked, *range(least)})
    picked = [i for i in picked if i < len(kinds)]
    for key, value in lists.items():
        plain[key] = [value[i] for i in picked]
    _gather_layers(plain)
    for key in _LAYERS:  # some configs also count layers that attend several times
        if isinstance(count := plain.get(key), int):
            plain[key] = max(1, len(picked) * count // total)
    for key, value in plain.items():
        if key.endswith("_layers") and key not in lists and isinstance(value, list):
            plain[key] = [i for i in value if not isinstance(i, int) or i < len(picked)]
    if isinstance(plain.get("max_window_layers"), int):
        plain["max_window_layers"] = min(plain["max_window_layers"], 1)


def _are_indices(value: Any) -> bool:
    """Whether it lists layers by their numbers, and has no entry for each."""
    return len(value) > 2 and list(value) == list(range(len(value)))


def _spread_layers(plain: dict[str, Any], lists: dict[str, Any], total: int) -> None:
    """What tells layers apart otherwise than by a list, as a list."""
    if overrides := plain.get(_OVERRIDES):
        by_layer = {int(layer): values for layer, values in overrides.items()}
        lists[_OVERRIDES] = [by_layer.get(i, {}) for i in range(total)]
    if count := plain.get(_SHARING):
        lists[_SHARING] = [i >= total - count for i in range(total)]


def _gather_layers(plain: dict[str, Any]) -> None:
    """The other way around."""
    if isinstance(overrides := plain.get(_OVERRIDES), list):
        plain[_OVERRIDES] = {str(i): values for i, values in enumerate(overrides) if values}
    if isinstance(sharing := plain.get(_SHARING), list):
        plain[_SHARING] = sum(sharing)


def _length(lists: Mapping[str, Any], total: int) -> int:
    return len(next(iter(lists.values()))) if lists else total


def _shrink_windows(plain: dict[str, Any]) -> None:
    """Windows that prompts exceed, and caps that scores reach."""
    for key, value in plain.items():
        is_window = "window" in key and not key.endswith(("_layers", "_pattern"))
        if is_window and type(value) is int and value > WINDOW:
            plain[key] = WINDOW
        elif is_window and isinstance(value, list):
            plain[key] = [WINDOW if type(v) is int and v > WINDOW else v for v in value]
    for key, value in plain.items():
        if "softcap" in key and isinstance(value, float):
            plain[key] = min(value, _CAP)
    # Lengths after which attention changes, and after which its temperature does.
    for key in ("attention_chunk_size", "floor_scale"):
        if type(plain.get(key)) is int:
            plain[key] = min(plain[key], WINDOW)
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("llama_4_scaling_beta"):
        rope["original_max_position_embeddings"] = WINDOW


def _shrink_vocabulary(plain: dict[str, Any]) -> None:
    plain["vocab_size"] = min(int(plain.get("vocab_size") or VOCAB_SIZE), VOCAB_SIZE)
    for key in plain:
        if key.startswith("vocab_size_") and type(plain[key]) is int:
            plain[key] = min(plain[key], VOCAB_SIZE)
    for key in _SPECIAL:
        if plain.get(key) is not None:
            plain[key] = None if key == "eos_token_id" else 0


def _shrink_width(plain: dict[str, Any], config: PreTrainedConfig) -> None:
    names = config.attribute_map

    def find(keys: tuple[str, ...]) -> str | None:
        for key in (*(names.get(k, k) for k in keys), *keys):
            if type(plain.get(key)) is int:
                return key
        return None

    heads_key, width_key = find(_HEADS), find(_WIDTHS)
    if heads_key is None or width_key is None:
        raise ValueError("its config does not say how many heads it has and how wide it is")
    width, heads = plain[width_key], plain[heads_key]
    kv_key = find(_KV_HEADS)
    kv_heads = plain[kv_key] if kv_key else heads
    head_dim = plain.get("head_dim") or width // heads
    small_kv = min(kv_heads, 2)
    small_heads = small_kv * min(max(heads // kv_heads, 1), 3)
    plain[heads_key] = small_heads
    for own in plain.get(_OVERRIDES, {}).values():
        if kv_key in own:  # they differ, if they can
            own[kv_key] = 1 if small_kv > 1 or small_heads == 1 else small_heads
    if kv_key:
        plain[kv_key] = small_kv
    small_width = small_heads * head_dim
    if width != heads * head_dim:  # in the original they differ, so they do here
        small_width = max(64, small_width // 32 * 16)  # kernels want whole vectors
    plain[width_key] = small_width
    for key in _SAME_WIDTH:
        if plain.get(key) == width:
            plain[key] = small_width
    for key in _INNER:
        plain[key] = _at_most(plain[key], _INNER_SIZE) if key in plain else None
        if plain[key] is None:
            del plain[key]
    if plain.get("mamba_expand"):  # hybrid families check it where no layer uses it, too
        plain["mamba_n_heads"], plain["mamba_d_head"] = 1, plain["mamba_expand"] * small_width
    _shrink_experts(plain)


def _shrink_experts(plain: dict[str, Any]) -> None:
    top_k = max((_largest(plain.get(key)) for key in _TOP_K), default=0)
    groups = max((_largest(plain.get(key)) for key in _GROUPS), default=0)
    enough = max(4, 2 * top_k, 2 * groups)
    for key in _EXPERTS:
        if key in plain:
            plain[key] = _at_most(plain[key], enough)


def _at_most(value: Any, most: int) -> Any:
    if isinstance(value, list):
        return [_at_most(each, most) for each in value]
    return min(value, most) if type(value) is int else value


def _largest(value: Any) -> int:
    if isinstance(value, list):
        return max((_largest(each) for each in value), default=0)
    return value if type(value) is int else 0


def draw_weights(model: torch.nn.Module) -> None:
    """Weights under which everything matters.

    With the usual ones attention is nearly uniform, biases are zero and norms one, so that a model
    without them would compute the same. Tables are small, or they would outweigh what layers add.
    """
    import torch

    for name, parameter in model.named_parameters():
        if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=1.5 / min(parameter.shape[-2:]) ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
