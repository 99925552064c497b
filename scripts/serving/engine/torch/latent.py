"""Multi-head latent attention (MLA): one small vector a token stands for the KV of all heads.

Keys and values of every head are linear in a *latent* of `rank` numbers; beside it, one rotated
piece of the key is shared by all heads. The KV cache keeps these two and nothing else. Attention
then has two exact forms:

* *expanded*: the latents become keys and values of all heads, as transformers computes it;
* *absorbed*: the queries are taken through the keys' matrix instead, attend to the latents as to a
  single head, and what comes out is taken through the values' matrix. Nothing of the cache is
  expanded, so this is the form for few queries.

transformers' attention modules of this kind expand in a method of their own, `expand_kv`, after
norms and rotation. `keep_latents` replaces that method by one that hands the latents on, so that
projections, norms, scalings and rotations stay the model's own code. It recognises modules by that
method and the sizes they state, and proves on sample latents that `Latent` expands them equally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from serving.engine.torch.cpu.int8_weights import Int8Linear
from serving.errors import ModelError

# Relative to the norm: what rounding explains. A wrong order of heads or parts differs by 1.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
_NUM_SAMPLES = 5

# Of one layer, while its chunk is computed. Several copies of as much are made, and memory of a GPU
# is not there for them: its KV pool takes nearly everything.
_EXPANDED_BYTES = {"cpu": 1 << 29, "cuda": 1 << 27}


class Latent(nn.Module):
    """The matrix that makes keys and values out of latents, in place of the layer that held it.

    `kept` is what the KV cache has of each token: `[..., rank + rope_dim]`, the latent first.
    """

    def __init__(
        self, weight: torch.Tensor, num_heads: int, nope_dim: int, rope_dim: int, value_dim: int
    ) -> None:
        """`weight` is `[num_heads * (nope_dim + value_dim), rank]`."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.num_heads, self.rank = num_heads, weight.shape[1]
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.kept_dim = self.rank + rope_dim

    def expand(
        self, kept: torch.Tensor, *, pad_values: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[H, S, nope_dim + rope_dim]` and values `[H, S, value_dim]` of `kept` `[1, S, .]`.

        `pad_values`: narrower values get zeros up to the size of the keys. Fused attention wants
        both of one size, and saves more than this costs.
        """
        latent, shared = kept[0, :, : self.rank], kept[0, :, self.rank :]
        both = linear(latent, self.weight).view(len(latent), self.num_heads, -1).transpose(0, 1)
        own, value = torch.split(both, [self.nope_dim, self.value_dim], dim=-1)
        key = torch.cat([own, shared.expand(self.num_heads, -1, -1)], dim=-1)
        if pad_values and (missing := key.shape[-1] - value.shape[-1]) > 0:
            value = pad(value, (0, missing))
        return key, value

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[H, T, nope_dim + rope_dim]` as queries of latents: `[H, T, rank + rope_dim]`."""
        own, shared = torch.split(query, [self.nope_dim, self.rope_dim], dim=-1)
        keys, _ = self._matrices()
        return torch.cat([torch.bmm(own, keys), shared], dim=-1)

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """Latents that were attended to, `[T, H, rank or more]`, as values `[T, H, value_dim]`."""
        _, values = self._matrices()
        latent = attended[..., : self.rank].transpose(0, 1)
        return torch.bmm(latent, values.transpose(1, 2)).transpose(0, 1)

    def prefers_expansion(self, num_queries: int, num_keys: int) -> bool:
        """Whether fewer products are made when the keys are expanded than when they are not, and
        memory allows it."""
        widened = self.nope_dim + self.value_dim
        expansion = num_keys * self.rank * widened
        absorption = num_queries * self.rank * widened
        wider_scores = num_queries * num_keys * (2 * self.rank - widened)
        return expansion < absorption + wider_scores and self.can_expand(num_keys)

    def can_expand(self, num_keys: int) -> bool:
        """Whether so many expanded keys and values take a bearable part of the memory."""
        num_bytes = num_keys * self.weight.shape[0] * self.weight.element_size()
        return num_bytes <= _EXPANDED_BYTES[self.weight.device.type]

    def _matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of keys `[H, nope_dim, rank]` and of values `[H, value_dim, rank]`."""
        both = self.weight.view(self.num_heads, -1, self.rank)
        return both[:, : self.nope_dim], both[:, self.nope_dim :]


def latent_of(module: nn.Module) -> Latent | None:
    """What `keep_latents` left on an attention module."""
    found = module._modules.get("kv_b_proj")
    return found if isinstance(found, Latent) else None


@torch.inference_mode()
def keep_latents(model: Any) -> int:
    """Make every attention module that expands latents hand them on; returns how many there are.

    Before linear layers are packed, which would hide the weight. Raises ModelError when a model
    that states a `kv_lora_rank` keeps its latents in another way than this.
    """
    modules = [module for module in model.modules() if callable(getattr(module, "expand_kv", None))]
    for module in modules:
        _keep(module)
    if getattr(model.config.get_text_config(), "kv_lora_rank", None) and not modules:
        raise _unknown("no module of it expands latents into keys and values")
    return len(modules)


def require_latents(latent: Latent, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises ModelError unless `key` and `value`, of one attention call, are what `expand_kv`
    handed on: a model that changes them before it attends would not attend to what is kept."""
    if key.shape[-1] != latent.kept_dim or value.data_ptr() != key.data_ptr():
        raise _unknown("keys and values are changed after they were expanded")


def _keep(module: Any) -> None:
    try:
        layer = module.kv_b_proj
        weight = layer.plain_weight() if isinstance(layer, Int8Linear) else layer.weight
        rank, nope, rope, value = (
            int(getattr(module, name))
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        latent = Latent(weight, weight.shape[0] // (nope + value), nope, rope, value)
        _require_equal(module, latent, rank)
    except (AttributeError, TypeError, ValueError, RuntimeError) as exc:
        raise _unknown(f"{type(exc).__name__}: {str(exc).splitlines()[0][:80]}") from exc
    module.kv_b_proj = latent
    module.expand_kv = _hand_on


def _hand_on(latent: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `expand_kv`: `[1, 1, T, .]` each, the values a part of the keys."""
    kept = torch.cat([latent, shared], dim=-1)
    return kept, kept[..., : latent.shape[-1]]


def _require_equal(module: Any, latent: Latent, rank: int) -> None:
    """Raises ModelError unless `module` expands random latents as `latent` does."""
    like = latent.weight
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn((1, _NUM_SAMPLES, rank + latent.rope_dim), generator=generator).to(like)
    theirs = module.expand_kv(kept[None, ..., :rank], kept[None, ..., rank:])
    for name, own, their in zip(("keys", "values"), latent.expand(kept), theirs, strict=True):
        if own.shape != their.shape[1:]:
            raise _unknown(f"its expanded {name} have another shape")
        error = float((own - their[0]).float().norm() / their.float().norm().clamp_min(1e-20))
        if not error <= _TOLERANCE[like.dtype]:
            raise _unknown(f"its expanded {name} would differ by {error:.2g}")


def _unknown(why: str) -> ModelError:
    return ModelError(
        f"the torch engine cannot run this model: its latent attention is of its own kind; {why}",
        remedy="use `engine.backend: tensorrt_llm` on GPUs, or another model",
    )
