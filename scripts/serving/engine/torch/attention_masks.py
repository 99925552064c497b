"""What each layer's mask lets it see, learned from one forward pass when a model is loaded.

transformers describes a mask by a function of two positions. It is evaluated far beyond any prompt
of the forward pass, so that windows are found that short prompts do not reach. Paged attention
knows three kinds: all earlier tokens, a window of them, or those of the token's own chunk. Anything
else is refused.
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

_CPU = torch.device("cpu")

MaskFunction = Callable[..., Any]


class Reach(NamedTuple):
    """Which earlier tokens a token sees: so many, itself included, or those in its own chunk of so
    many positions. Both None: all."""

    window: int | None = None
    chunk: int | None = None


class _Mask(NamedTuple):
    """A mask that transformers was handed, and what it means; or why it has no meaning here."""

    tensor: torch.Tensor
    reach: Reach | ModelError


class _Learning(threading.local):
    """Of the forward pass under way in this thread."""

    span: int
    masks: list[_Mask]
    reaches: dict[int, tuple[Any, Reach]]


_learning = _Learning()


@torch.inference_mode()
def learn_reaches(model: Any) -> None:
    """Leave on each attention module, as `learned_reach`, which tokens its mask lets it see.

    Raises ModelError for a mask that paged attention does not implement, and for a layer that
    attends twice.
    """
    AttentionInterface.register(PROBE_NAME, _observe)
    AttentionMaskInterface.register(PROBE_NAME, _describe)
    config = model.config.get_text_config()
    _learning.span = getattr(config, "max_position_embeddings", None) or _DEFAULT_SPAN
    _learning.masks, _learning.reaches = [], {}
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
        found, _learning.reaches, _learning.masks = _learning.reaches, {}, []
    for module, reach in found.values():
        module.learned_reach = reach


def reach_of(mask_function: MaskFunction, span: int, device: torch.device = _CPU) -> Reach:
    """What the mask lets a token see, up to position `span`. What it was made of is on `device`.

    Raises ModelError when the mask is of another kind.
    """
    counts = {
        query: _count_seen(mask_function, query, device)
        for query in sorted({0, 1, span // 3, span // 2, span - 1})
    }
    if all(count == query + 1 for query, count in counts.items()):
        return Reach()
    # Where the first token is hidden first, a window is full, or the second chunk begins.
    limit = _first_without_beginning(mask_function, span, device)
    counts |= {
        query: _count_seen(mask_function, query, device)
        for query in (limit - 1, limit, limit + 1, 2 * limit - 1, 2 * limit)
        if 0 < query < span
    }
    if limit and all(count == min(query + 1, limit) for query, count in counts.items()):
        return Reach(window=limit)
    if limit and all(count == query % limit + 1 for query, count in counts.items()):
        return Reach(chunk=limit)
    raise _unknown("how far back it lets a token see depends on the position")


def _count_seen(mask_function: MaskFunction, query: int, device: torch.device) -> int:
    """How many tokens a token sees, itself and those before it. Raises ModelError."""
    keys = torch.arange(query + 1 + _BEYOND, device=device)
    visible = _evaluated(mask_function, torch.tensor(query, device=device), keys)
    if visible[query + 1 :].any():
        raise _unknown("it lets a token see later ones")
    count = int(visible[: query + 1].sum())
    if not visible[query + 1 - count : query + 1].all():
        raise _unknown("it hides tokens between others that it shows")
    return count


def _first_without_beginning(mask_function: MaskFunction, span: int, device: torch.device) -> int:
    """The first position from which the first token is not seen; 0: always seen."""
    queries = torch.arange(span, device=device)
    hidden = ~_evaluated(mask_function, queries, torch.zeros_like(queries[0]))
    return int(hidden.int().argmax())


def _evaluated(
    mask_function: MaskFunction, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    zero = torch.zeros_like(keys.flatten()[0])
    try:
        seen = torch.as_tensor(mask_function(zero, zero, queries, keys))
        return seen.broadcast_to((queries + keys).shape)
    except (IndexError, RuntimeError, TypeError) as exc:
        raise _unknown("which tokens it lets a token see depends on the prompt") from exc


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
    reach: Reach | ModelError
    try:
        reach = reach_of(mask_function, _learning.span, tensor.device)
    except ModelError as exc:
        reach = exc  # a model may make masks that none of its layers use
    _learning.masks.append(_Mask(tensor, reach))
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
    if layer in _learning.reaches:
        raise ModelError(
            "the torch engine cannot run this model: layer "
            f"{layer} attends more than once for a token",
            remedy=REMEDY,
        )
    for name, argument in options.items():
        if isinstance(argument, torch.Tensor) and name not in _KNOWN:
            raise _unknown(f"its attention also takes `{name}`")
    _learning.reaches[layer] = (module, _reach(module, attention_mask, options))
    if latent := latent_of(module):
        if _learning.reaches[layer][1] != Reach():
            raise _unknown("its latent attention has a window")
        require_latents(latent, key, value)
        value = latent.expand(key[0])[1][None]
    attended = query if value.shape[-1] == query.shape[-1] else value
    return attended.transpose(1, 2).contiguous(), None


def _reach(module: Any, mask: torch.Tensor | None, options: dict[str, Any]) -> Reach:
    if mask is None:
        # No mask was asked for: SDPA decides by this flag.
        is_causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise _unknown("it lets a token see later ones")
        return Reach(options.get("sliding_window"))
    for known in _learning.masks:
        if mask is known.tensor or (
            mask.shape == known.tensor.shape and mask.data_ptr() == known.tensor.data_ptr()
        ):
            if isinstance(known.reach, ModelError):
                raise known.reach
            return known.reach
    raise _unknown("layers change the mask before they attend")
