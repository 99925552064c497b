"""Random weights in place of a model's, for load tests of a shape whose weights are not at hand.

Nothing is written: every worker makes them from config.json, on its own device and in its own
dtype. One seed gives the same weights on equal devices, so KV that a prefill worker computed fits a
decode worker. The model's own initialisation draws them; answers are noise.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.files import human
from serving.engine.manifest import BuildCheck, DummyWeights, load_manifest
from serving.engine.torch.weights.logits_check import require_layout
from serving.errors import ModelError, OperatorError
from serving.kv_layout import DTYPE_BYTES, KvLayout
from serving.progress import Report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

SEED = 0
UNCHECKED = BuildCheck(
    kind="none", num_positions=0, max_abs_diff=0.0, argmax_agreement=0.0, tolerance=0.0
)


def describe_dummy(
    config: PreTrainedConfig, staging: Path, layout: KvLayout, report: Report
) -> DummyWeights:
    """Prove that the model can be made, without memory for it, and fit the tokenizer to it.

    `staging` has the tokenizer. Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        # On this device, torch multiplies experts in bfloat16 only; shapes do not depend on it.
        model = auto.from_config(config, dtype=torch.bfloat16)
        require_layout(model, layout)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    _fit_tokenizer(staging / "tokenizer.json", config.vocab_size, report)
    size = human(num_weights * DTYPE_BYTES[layout.dtype])
    report(
        f"dummy weights: every worker makes {num_weights / 1e6:.0f} million random ones, {size}; "
        "no logits are compared, and answers are noise"
    )
    return DummyWeights(SEED, num_weights)


def of_engine(engine_dir: Path) -> DummyWeights | None:
    """The dummy weights of an engine, from engine.json; None for real ones. Raises ModelError."""
    if not (engine_dir / "engine.json").exists():  # a plain Hugging Face folder
        return None
    return load_manifest(engine_dir).dummy_weights


def make_model(
    engine_dir: Path, seed: int, device: torch.device, dtype: torch.dtype, *, attention: str
) -> PreTrainedModel:
    """The model of `engine_dir`'s config.json with random weights, made on `device` in `dtype`.

    Raises OperatorError when they do not fit, and whatever transformers raises.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from serving.engine.torch.weights.multimodal.text_class import with_text_class

    auto: Any = AutoModelForCausalLM
    config = with_text_class(AutoConfig.from_pretrained(engine_dir, local_files_only=True))
    gpus = [device] if device.type == "cuda" else []
    started = time.monotonic()
    try:
        # The caller's own random numbers go on as if nothing had been drawn.
        with torch.random.fork_rng(gpus), device:
            torch.manual_seed(seed)
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except torch.OutOfMemoryError as exc:
        raise OperatorError(
            f"the dummy weights do not fit on {device}",
            remedy="choose a smaller shape or a larger GPU",
        ) from exc
    log.warning(
        "dummy weights (seed %d), made in %.1f s: answers are noise",
        seed,
        time.monotonic() - started,
    )
    return model


def _fit_tokenizer(path: Path, vocab_size: int, report: Report) -> None:
    """Give every token id of the model a text: clients count tokens by the text they bring.

    Prompts are encoded as before. Raises ModelError for a tokenizer larger than the model.
    """
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram: a list with a score for each piece
        return
    added = [token["id"] for token in content.get("added_tokens", [])]
    num_tokens = 1 + max([*vocabulary.values(), *added])
    if num_tokens > vocab_size:
        raise ModelError(
            f"the tokenizer has {num_tokens} tokens, config.json says `vocab_size` {vocab_size}",
            remedy="raise vocab_size, or give the model a tokenizer that is small enough",
        )
    if num_tokens == vocab_size:
        return
    space = "Ġ" if "ByteLevel" in json.dumps(content.get("decoder")) else "▁"
    vocabulary.update({f"{space}~{index}": index for index in range(num_tokens, vocab_size)})
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    report(f"the tokenizer's {num_tokens} tokens are extended to the model's {vocab_size}")
