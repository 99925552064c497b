"""What a GGUF file says about its model, put into the config that transformers makes of it.

transformers keeps a fixed list of keys for each architecture and drops the others without a word.
Dropped scalings and windows do not stop a model; it answers wrongly. Here they are put into the
config, or the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.engine.torch.weights import gguf_positions
from serving.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_REMEDY = "use the model's original repository or folder with safetensors"
# Keys of this kind change what a model computes.
_MEANINGFUL = re.compile(
    r"scal|cap|clamp|window|temperature|swin|alibi|norm_before|rope\.|expert|gating|_length|pattern"
)
# Written here, written by transformers for every architecture, or only about how the file came to be.
_READ = {
    *("context_length", "embedding_length", "feed_forward_length"),
    *("attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scale_linear"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_OFF = {"", "none", 0, 1.0}

Values = dict[str, Any]
"""A file's values by their keys, without the architecture in front."""


class GgufFacts:
    """What a file says, but for tokens and weights."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader: Any = GGUFReader(path)
        self.name = path.name
        self.architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{self.architecture}."
        self.values: Values = {
            key.removeprefix(prefix): field.contents()
            for key, field in reader.fields.items()
            if key.startswith(prefix)
        }
        self.special_tokens: Values = {
            key.removeprefix("tokenizer.ggml."): field.contents()
            for key, field in reader.fields.items()
            if key.endswith("_token_id")
        }
        self.shapes: dict[str, list[int]] = {
            tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors
        }
        self.positions: dict[str, list[float]] = {
            tensor.name: [float(value) for value in tensor.data]
            for tensor in reader.tensors
            if tensor.name.startswith("rope")
        }

    def require_known(self) -> None:
        """Raises ModelError for an architecture whose conversion was not compared with its source."""
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{self.name} has the architecture `{self.architecture}`, which this project does "
                f"not read from GGUF. It reads {', '.join(sorted(ARCHITECTURES))}",
                remedy=_REMEDY,
            )


def complete(config: PreTrainedConfig, facts: GgufFacts) -> PreTrainedConfig:
    """`config`, as transformers read it, with all that the file says.

    Raises ModelError for a scaling, window or cap that would be dropped.
    """
    facts.require_known()
    values = facts.values
    addition = ARCHITECTURES[facts.architecture]
    changed = _head_sizes(config, facts) | addition.make(config, values)
    plain = config.to_dict() | changed | _special_tokens(facts.special_tokens)
    if "rope_parameters" in plain:
        plain |= gguf_positions.rotary(plain, facts.values, facts.positions, facts.name)
    elif facts.positions:
        raise _lost(facts, f"a tensor `{next(iter(facts.positions))}` for its positions")
    taken = {key for key, name in _mapped(facts.architecture).items() if name is not None}
    for key, value in values.items():
        off = str(value).lower() in _OFF or (not isinstance(value, list) and value in _OFF)
        if _MEANINGFUL.search(key) and not off and key not in taken | _READ | addition.keys:
            raise _lost(facts, f"`{facts.architecture}.{key}: {value}`")
    return type(config).from_dict(plain)


def _special_tokens(ids: Values) -> Values:
    """What the file does not have stays unset: the defaults are another model's."""
    ends = [ids[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in ids]
    return {
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": sorted(set(ends), key=ends.index)
        if len(set(ends)) > 1
        else (*ends, None)[0],
        "pad_token_id": ids.get("padding_token_id"),
    }


def require_all_read(config: PreTrainedConfig, facts: GgufFacts) -> None:
    """Raises ModelError when the file has a tensor that would be passed over, such as a bias."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as reading

    tools: Any = reading
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    processor = tools.TENSOR_PROCESSORS.get(facts.architecture, tools.TensorProcessor)
    names = tools.get_gguf_hf_weights_map(model, processor(config=config.to_dict()))
    # transformers strips `.weight` from the names of experts.
    known = {*names, *(f"{name}.weight" for name in names), *facts.positions, "output.weight"}
    if lost := sorted(set(facts.shapes) - known):
        raise _lost(facts, f"{len(lost)} tensors such as `{lost[0]}`")


def _lost(facts: GgufFacts, what: str) -> ModelError:
    return ModelError(
        f"{facts.name} has {what}, which would be lost when it is converted", remedy=_REMEDY
    )


def _mapped(architecture: str) -> dict[str, str | None]:
    """transformers' keys of an architecture, under GGUF's or its own name of it."""
    from transformers.integrations import ggml

    names = (architecture, re.sub(r"moe$", "_moe", architecture), architecture.replace("-", "_"))
    mapping: Any = ggml.GGUF_CONFIG_MAPPING
    found: dict[str, str | None] = {}
    for name in names:
        found = found or mapping.get(name, {})
    return found


# --- what each architecture leaves out ------------------------------------------------------------


def _head_sizes(config: PreTrainedConfig, facts: GgufFacts) -> Values:
    """Size of a head, and the part of it that turns."""
    values = facts.values
    heads = config.num_attention_heads
    size = values.get("attention.key_length") or config.hidden_size // heads
    if values.get("attention.value_length", size) != size:
        raise _lost(facts, "keys and values of different sizes")
    turning = values.get("rope.dimension_count", size)
    has_size = hasattr(config, "head_dim") or "head_dim" in config.to_dict()
    if not has_size and size * heads != config.hidden_size:
        raise _lost(facts, f"heads of {size} dimensions")
    changed: Values = {"head_dim": size} if has_size else {}
    if turning != size:
        if facts.architecture not in _PARTLY_TURNING:
            raise _lost(facts, f"positions in {turning} of {size} dimensions")
        rope = dict(config.rope_parameters)
        changed["rope_parameters"] = rope | {"partial_rotary_factor": turning / size}
    return changed


def _nothing(config: PreTrainedConfig, values: Values) -> Values:
    return {}


_EXPERTS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}


def _experts(config: PreTrainedConfig, values: Values) -> Values:
    return {name: values[key] for key, name in _EXPERTS.items() if key in values}


def _gemma(config: PreTrainedConfig, values: Values) -> Values:
    """The scale of scores is not in the file. It follows the size of a head but in 27B models."""
    heads, size = config.num_attention_heads, values.get("attention.key_length", 256)
    is_27b = config.num_hidden_layers == _GEMMA_27B_LAYERS[config.model_type]
    scalar = config.hidden_size // heads if is_27b else size
    caps = {name: values[key] for key, name in _CAPS.items() if key in values}
    return {"query_pre_attn_scalar": scalar, **caps}


def _phi3(config: PreTrainedConfig, values: Values) -> Values:
    changed: Values = {"sliding_window": values.get("attention.sliding_window") or None}
    if original := values.get("rope.scaling.original_context_length"):
        changed["original_max_position_embeddings"] = original
    return changed


class Addition(NamedTuple):
    """`make` gives what is to be added to transformers' config; it reads `keys`."""

    make: Callable[[Any, Values], Values] = _nothing
    keys: frozenset[str] = frozenset()


_PARTLY_TURNING = {"phi3"}
_PLAIN, _MOE = Addition(), Addition(_experts, frozenset(_EXPERTS))
_GEMMA = Addition(_gemma, frozenset(_CAPS))

ARCHITECTURES = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2moe": _MOE,
    "qwen3": _PLAIN,
    "qwen3moe": _MOE,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": Addition(_phi3, frozenset({"attention.sliding_window"})),
    "gpt2": _PLAIN,
}
"""By GGUF's names."""
