"""Whether a packed model computes what its source computes.

Both are run in float32, whatever they are stored in, so that the difference is what packing did to
the weights and not the arithmetic of a narrow type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serving.engine.manifest import BuildCheck
from serving.errors import ModelError
from serving.kv_layout import KvLayout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nassert add(19, 23) == ",
    "Grüße aus Köln, 東京から、🙂 1234567890!",
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "int8": 0.2}
"""Largest difference, as a fraction of the largest logit, that rounding the weights explains.

int8: rounding SmolLM2-135M's weights gives 0.055; one scale for all activations of a tensor, which
makes it choose other tokens at half of all positions, 0.53.
"""


def tokenized_prompts(tokenizer_dir: Path) -> list[list[int]]:
    """The ids of `PROMPTS`. Raises ModelError for a damaged tokenizer."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    except Exception as exc:  # the library raises nothing narrower
        raise ModelError(
            f"the model's tokenizer.json is damaged: {exc}", remedy="fetch or copy the model again"
        ) from exc
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def run_prompts(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits `[num_tokens, vocab_size]` in float32 of each prompt. Raises ModelError if not finite."""
    import torch

    with torch.inference_mode():
        logits = [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]
    if not all(bool(torch.isfinite(each).all()) for each in logits):
        raise ModelError(
            "the model computes infinities or NaN",
            remedy="its weights are damaged, or too large for `engine.dtype`: try bfloat16",
        )
    return logits


def compare(source: list[torch.Tensor], packed: list[torch.Tensor], dtype: str) -> BuildCheck:
    """Raises ModelError when the packed model is further from its source than rounding explains."""
    largest = max(float(logits.abs().max()) for logits in source)
    tolerance = TOLERANCE[dtype] * largest
    pairs = list(zip(source, packed, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    num_positions = sum(len(logits) for logits in source)
    if difference > tolerance:
        raise ModelError(
            f"the packed model's logits differ by {difference:.3g} from the source model's, more "
            f"than {tolerance:.3g}, which {dtype} explains",
            remedy="build with `engine.dtype: float32`; if that fails too, report the model",
        )
    return BuildCheck(
        kind="logits",
        num_positions=num_positions,
        max_abs_diff=difference,
        argmax_agreement=agreeing / num_positions,
        tolerance=tolerance,
    )


def require_layout(model: PreTrainedModel, layout: KvLayout) -> None:
    """Check the layout against the cache the model really fills. Raises ModelError."""
    import torch

    with torch.inference_mode():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    is_latent = layout.is_uniform and layout.num_planes == 1
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    for layer in getattr(cache, "layers", []):
        tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
        shapes = [(t.shape[1], t.shape[3]) for t in tensors if t is not None and t.dim() == 4]
        if is_latent and len(shapes) == 2 and shapes[0][0] == shapes[1][0]:
            # A latent, and beside it the part of the key that it does not give.
            shapes = [(shapes[0][0], shapes[0][1] + shapes[1][1])]
        found[tuple(shapes)] += 1
    expected: Counter[tuple[tuple[int, int], ...]] = Counter()
    for group in layout.groups:
        dims = filter(None, (group.key_dim, group.value_dim))
        expected[tuple((group.num_kv_heads, dim) for dim in dims)] += group.num_layers
    if found != expected:
        raise ModelError(
            "the torch engine cannot run this model: expected were "
            f"{_described(expected)}; its cache has {_described(found)}",
            remedy="choose another model; README.md lists under Limits what is not supported",
        )


def _described(layers: Counter[tuple[tuple[int, int], ...]]) -> str:
    return ", ".join(
        f"{count} layers of (KV heads, dimension) {' and '.join(str(s) for s in dict.fromkeys(shapes))}"
        for shapes, count in layers.items()
    )
