"""Rotary positions of a GGUF file as transformers' `rope_parameters`.

A file states a base and sometimes a scaling. Llama 3.1 and later have a tensor of factors in place
of one, and Phi-3 two of them, for short prompts and for long ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import ModelError

_REMEDY = "use the model's original repository or folder with safetensors"
_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Llama 3's own choice, and that of everybody who followed it.
_LOW_FREQUENCY, _HIGH_FREQUENCY, _LLAMA3_LENGTH = 1.0, 4.0, 8192
_DEFAULT_BASE = 10_000.0


def rotary(
    plain: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Mapping[str, Sequence[float]],
    name: str,
) -> dict[str, Any]:
    """The config's `rope_parameters`, given its other keys. Raises ModelError for other scalings."""
    known: dict[str, Any] = plain.get("rope_parameters") or {}
    base = float(values.get("rope.freq_base", _DEFAULT_BASE))
    scaling = _of_tensors(plain, values, tensors, base, name) or _of_keys(values, name)
    if "full_attention" in known:  # Gemma 3: only layers that see everything are scaled
        local = float(values.get("rope.freq_base_swa", _DEFAULT_BASE))
        return {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": base} | scaling,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        }
    kept = {key: known[key] for key in ("partial_rotary_factor",) if key in known}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base} | kept | scaling}


def _of_keys(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = str(values.get("rope.scaling.type", "none")).lower()
    factor = float(values.get("rope.scaling.factor", 1.0))
    legacy = float(values.get("rope.scale_linear", 1.0))
    if legacy != 1.0 and kind == "none":
        kind, factor = "linear", legacy
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = values.get("rope.scaling.original_context_length")
    unknown = {"rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"} & set(values)
    if kind != "yarn" or not original or unknown:
        what = sorted(unknown)[0] if unknown else f"rope.scaling.type: {kind}"
        raise ModelError(
            f"{name} has scaled positions that cannot be converted exactly (`{what}`"
            f"{'' if original else ', without an original context length'})",
            remedy=_REMEDY,
        )
    attention = float(values.get("rope.scaling.attn_factor", 1.0))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": float(values.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(values.get("rope.scaling.yarn_beta_slow", 1.0)),
        "attention_factor": attention * (0.1 * math.log(factor) + 1.0),
    }


def _of_tensors(
    plain: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Mapping[str, Sequence[float]],
    base: float,
    name: str,
) -> dict[str, Any]:
    if not tensors:
        return {}
    limit = int(plain["max_position_embeddings"])
    if set(tensors) == {_FREQUENCIES}:
        factors = list(tensors[_FREQUENCIES])
        if llama3 := _llama3(factors, base):
            return llama3
        # Used as they are, at every length.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": limit,
        }
    original = values.get("rope.scaling.original_context_length")
    if set(tensors) != {_SHORT, _LONG} or not original:
        raise ModelError(
            f"{name} has tensors for its positions that cannot be converted exactly "
            f"({', '.join(sorted(tensors))}"
            f"{'' if original else '; it does not say its original context length'})",
            remedy=_REMEDY,
        )
    scaling = {
        "rope_type": "longrope",
        "short_factor": list(tensors[_SHORT]),
        "long_factor": list(tensors[_LONG]),
        "original_max_position_embeddings": int(original),
    }
    if attention := values.get("rope.scaling.attn_factor"):
        scaling["attention_factor"] = float(attention)
    return scaling


def _llama3(factors: Sequence[float], base: float) -> dict[str, Any] | None:
    """The parameters that give these factors for each frequency, if Llama 3's formula does."""
    largest = max(factors)
    for index, factor in enumerate(factors):
        turns = _LLAMA3_LENGTH * base ** (-index / len(factors)) / (2 * math.pi)
        smooth = (turns - _LOW_FREQUENCY) / (_HIGH_FREQUENCY - _LOW_FREQUENCY)
        smooth = min(max(smooth, 0.0), 1.0)
        expected = 1 / ((1 - smooth) / largest + smooth)
        if not math.isclose(expected, factor, rel_tol=1e-5):
            return None
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": _LOW_FREQUENCY,
        "high_freq_factor": _HIGH_FREQUENCY,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }
