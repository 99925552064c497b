"""Engines of a stated shape with dummy weights, for benchmarks on machines without any model.

They are made as a deployment makes them: `fetch_model` describes a folder, `build_engine` builds.
The tokenizer is one of single bytes; the build extends it to the model's vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest
from serving.engine.torch.build import build_engine

ROOT = Path(__file__).resolve().parents[3]
LLAMA_8B = ROOT / "config" / "models" / "llama-3-8b-shape"
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""For trying a benchmark where the real shape would take too long."""


def make_engine(folder: Path, *, device: str, dtype: str, tiny: bool = False) -> EngineManifest:
    """Build into `folder / "engine"`; takes about two seconds, whatever the shape."""
    shape = folder / "shape"
    shape.mkdir(parents=True)
    if tiny:
        (shape / "config.json").write_text(json.dumps(TINY))
    else:
        shutil.copyfile(LLAMA_8B / "config.json", shape / "config.json")
    _save_byte_tokenizer(shape)
    model = fetch_model(ModelConfig(id=str(shape)), folder / "model", weights="dummy", report=_tell)
    engine = EngineConfig(device=device, dtype=dtype, weights="dummy")  # type: ignore[arg-type]
    return build_engine(
        model, folder / "engine", engine=engine, fingerprint="benchmark", report=_tell
    )


def _save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|begin|>", "<|end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
