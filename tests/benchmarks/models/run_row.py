"""One row of the matrix, from a checkpoint on disk to the engine's answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.models.checkpoint import Checkpoint
from benchmarks.models.forms import FORMS
from benchmarks.models.row import Result, Row
from benchmarks.models.small_multimodal import small_multimodal_of
from safetensors.torch import save_file
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.torch.build import build_engine
from serving.engine.torch.build_check.engine_answers import BLOCK_SIZE, Case, answer
from serving.engine.torch.build_check.serving_check import (
    TOLERANCE,
    first_difference,
    reference,
)
from serving.engine.torch.build_check.shrink import VOCAB_SIZE, WINDOW, small_model_of
from serving.engine.torch.kv.config_layout import kv_layout
from serving.engine.torch.weights.multimodal.outer_model import is_multimodal
from serving.errors import ConfigError, ModelError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast


def run(row: Row, folder: Path, device: str = "cpu") -> Result:
    """Take `row` from a checkpoint in the empty `folder` to answers."""
    started = time.monotonic()
    config = row.config
    result = _run(row, config, folder, device)
    result.seconds = time.monotonic() - started
    if result.verdict == "exact":
        result.kv_bytes = kv_layout(config.get_text_config(), BLOCK_SIZE, "bfloat16").token_bytes
    return result


def _run(row: Row, config: Any, folder: Path, device: str) -> Result:
    source = folder / "model"
    try:
        small = small_multimodal_of if is_multimodal(config) else small_model_of
        small(config, source, seed=3)
    except ModelError as failure:
        # What is refused from its config alone need not come in a small form.
        source.mkdir(exist_ok=True)
        config.save_pretrained(source)
        save_file({"weight": torch.ones(1)}, source / "model.safetensors")
        if row.expected == "exact":
            return Result("CRASH", str(failure).splitlines()[0])
    save_tokenizer(source)
    checkpoint = FORMS[row.form](source) or Checkpoint(source, source)
    try:
        fetched = fetch_model(
            ModelConfig(id=str(checkpoint.path), allow_pickle=True),
            folder / "fetched",
            report=[].append,
        )
        build_engine(
            fetched,
            folder / "engine",
            engine=EngineConfig(device="cpu", dtype="float32", max_model_len=256),
            fingerprint="matrix",
            report=[].append,
        )
        cases = list(_cases())
        answers = answer(
            folder / "engine", "float32", device, cases[:4], cases[4:6], exported=cases[6:]
        )
    except (ModelError, ConfigError) as failure:
        reason = str(failure).splitlines()[0]
        return Result("refused" if failure.remedy else "UNCLEAR", reason)
    except Exception as failure:
        return Result("CRASH", f"{type(failure).__name__}: {failure}".splitlines()[0])
    auto = AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM
    model = auto.from_pretrained(
        checkpoint.reference, dtype=torch.float32, attn_implementation="eager"
    )
    references = [reference(model, case) for case in cases]
    difference = first_difference(references, answers, TOLERANCE["float32"])
    return Result("WRONG", str(difference)) if difference else Result("exact")


def _cases() -> Iterator[Case]:
    """Four together (the longest in chunks of 32), then alone and with a prefix hit, then exported."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()

    long = tokens(4 * WINDOW + 5)
    yield Case("four together, in chunks", long, 10)
    for count in (3, BLOCK_SIZE, WINDOW + 1):
        yield Case(f"four together, {count} tokens", tokens(count), 12)
    yield Case("alone", tokens(2 * WINDOW + 1), 8)
    yield Case("a prefix hit", [*long[: 6 * BLOCK_SIZE + 1], *tokens(5)], 8)
    yield Case("KV from another engine", tokens(3 * WINDOW + 2), 8)


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
