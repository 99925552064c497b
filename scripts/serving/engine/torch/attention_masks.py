"""What each layer's mask lets it see, learned from one forward pass when a model is loaded.

transformers describes a mask by a function of two positions. It is evaluated far beyond any prompt
of the forward pass, so that windows are found that short prompts do not reach. Paged attention
knows two kinds: all earlier tokens, or a window of them. Anything else is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from serving.engine.torch.attention import NAME
from serving.engine.torch.latent import latent_of, require_latents
from serving.errors import ModelError

PROBE_NAME = "serving_mask_probe"
REMEDY = "use `engine.backend: tensorrt_llm` on GPUs, or another model"

_NUM_TOKENS = 5
_BEYOND = 64  # later positions that a token must not see
_DEFAULT_SPAN = 1 << 16
# Arguments that say nothing about which tokens are seen, or that paged attention honours.
_KNOWN = {"s_aux", "position_ids", "cache_position", "kv_step", "position_embeddings"}

MaskFunction = Callable[..., Any]


class _Mask(NamedTuple):
    """A mask that transformers was handed, and its window; None: all earlier tokens."""

    tensor: torch.Tensor
    window: int | None


class _Learning(threading.local):
    """Of the forward pass under way in this thread."""

    span: int
    masks: list[_Mask]
    windows: dict[int, tuple[Any, int | None]]


_learning = _Learning()


@torch.inference_mode()
def learn_windows(model: Any) -> None:
    """Leave on each attention module, as `learned_window`, how far back its mask lets it look.

    Raises ModelError for a mask that paged attention does not implement, and for a layer that
    attends twice.
    """
    AttentionInterface.register(PROBE_NAME, _observe)
    AttentionMaskInterface.register(PROBE_NAME, _describe)
    config = model.config.get_text_config()
    _learning.span = getattr(config, "max_position_embeddings", None) or _DEFAULT_SPAN
    _learning.masks, _learning.windows = [], {}
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    device = next(model.parameters()).device
    ids = torch.arange(_NUM_TOKENS, device=device)[None] % config.vocab_size
    positions = torch.arange(_NUM_TOKENS, device=device)[None]
    try:
        for each in configs.values():
            each._attn_implementation = PROBE_NAME
        model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for each in configs.values():
            each._attn_implementation = NAME
        found, _learning.windows, _learning.masks = _learning.windows, {}, []
    for module, window in found.values():
        module.learned_window = window


def window_of(mask_function: MaskFunction, span: int) -> int | None:
    """How many tokens back, itself included, a token sees; None: all earlier ones.

    Raises ModelError when the mask is of another kind.
    """
    window: int | None = None
    for query in sorted({0, 1, span // 3, span // 2, span - 1}):
        keys = torch.arange(query + 1 + _BEYOND)
        zero = torch.tensor(0)
        try:
            seen = mask_function(zero, zero, torch.tensor(query), keys)
            visible = torch.as_tensor(seen).broadcast_to(keys.shape)
        except (IndexError, RuntimeError, TypeError) as exc:
            raise _unknown("which tokens it lets a token see depends on the prompt") from exc
        if visible[query + 1 :].any():
            raise _unknown("it lets a token see later ones")
        count = int(visible[: query + 1].sum())
        if not visible[query + 1 - count : query + 1].all():
            raise _unknown("it hides tokens between others that it shows")
        if count <= query:
            if window not in (None, count):
                raise _unknown("how far back it lets a token see depends on the position")
            window = count
        elif window is not None:
            raise _unknown("how far back it lets a token see depends on the position")
    return window


def _unknown(why: str) -> ModelError:
    return ModelError(
        f"the torch engine cannot run this model: it has an attention mask of its own kind; {why}",
        remedy=REMEDY,
    )


def _describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **_: Any,
) -> torch.Tensor:
    """Registered as a maker of masks: the tensor stands for the description until it is seen."""
    tensor = torch.zeros((batch_size, 1, q_length, kv_length), dtype=dtype, device=device)
    _learning.masks.append(_Mask(tensor, window_of(mask_function, _learning.span)))
    return tensor


def _observe(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Registered as attention: notes the mask, and hands the queries back."""
    layer: int = module.layer_idx
    if layer in _learning.windows:
        raise ModelError(
            "the torch engine cannot run this model: layer "
            f"{layer} attends more than once for a token",
            remedy=REMEDY,
        )
    for name, argument in options.items():
        if isinstance(argument, torch.Tensor) and name not in _KNOWN:
            raise _unknown(f"its attention also takes `{name}`")
    _learning.windows[layer] = (module, _window(module, attention_mask, options))
    if latent := latent_of(module):
        require_latents(latent, key, value)
        value = latent.expand(key[0])[1][None]
    attended = query if value.shape[-1] == query.shape[-1] else value
    return attended.transpose(1, 2).contiguous(), None


def _window(module: Any, mask: torch.Tensor | None, options: dict[str, Any]) -> int | None:
    if mask is None:
        # No mask was asked for: SDPA decides by this flag.
        is_causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise _unknown("it lets a token see later ones")
        return options.get("sliding_window")
    for known in _learning.masks:
        if mask is known.tensor or (
            mask.shape == known.tensor.shape and mask.data_ptr() == known.tensor.data_ptr()
        ):
            return known.window
    raise _unknown("layers change the mask before they attend")
