"""Which models the torch engine serves exactly: tiny random ones of many families and forms.

    python tests/benchmarks/model_matrix.py [--only WORD] [--device cpu]

Each row goes the whole way: a checkpoint on disk, `fetch_model`, `build_engine`, and the engine over
the result in every mode (alone, four together, in chunks, with a prefix hit, with KV from another
engine), against `generate` on the checkpoint. A row is `exact` or `refused` with a reason and a
remedy; `WRONG` and `CRASH` end the script with status 1. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.torch.build import build_engine, kv_layout
from serving.engine.torch.build_check.engine_answers import BLOCK_SIZE, Case, answer
from serving.engine.torch.build_check.serving_check import (
    TOLERANCE,
    first_difference,
    reference,
)
from serving.engine.torch.build_check.shrink import VOCAB_SIZE, WINDOW, small_model_of
from serving.errors import ConfigError, ModelError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Row:
    """A config of a family, full size, and what becomes of the checkpoint before it is fetched."""

    name: str
    model_type: str
    expected: str = "exact"
    values: dict[str, Any] = field(default_factory=dict)
    form: str = "safetensors"

    @property
    def config(self) -> Any:
        return CONFIG_MAPPING[self.model_type](**self.values)


@dataclass
class Result:
    verdict: str
    note: str = ""
    kv_bytes: int = 0
    seconds: float = 0.0


# --- forms of a checkpoint ------------------------------------------------------------------------


def _as_is(folder: Path) -> None:
    """One safetensors file in float32."""


def _in_bfloat16(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard_of = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        part = {name: weights[name] for name in weights if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _with_scales(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[f"{name}_scale"] = torch.ones(1)
    save_file(weights, path, metadata={"format": "pt"})


def _by_modelopt(folder: Path) -> None:
    stated = {"quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(stated))


def _quantized(method: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
        path.write_text(json.dumps(config))

    return apply


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tekken.json")


FORMS: dict[str, Callable[[Path], None]] = {
    "safetensors": _as_is,
    "bfloat16": _in_bfloat16,
    "sharded": _sharded,
    "pickle": _pickled,
    "tensors with scales": _with_scales,
    "FP8 by ModelOpt": _by_modelopt,
    "GPTQ": _quantized("gptq"),
    "MXFP4": _quantized("mxfp4"),
    "tekken.json alone": _without_tokenizer,
}

# --- rows -----------------------------------------------------------------------------------------

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}
_GQA = {"num_key_value_heads": 8}

ROWS = [
    Row("Llama 3.x", "llama", values={**_GQA, "rope_parameters": _LLAMA3}),
    Row("Llama, dynamic RoPE", "llama", values={
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Llama, linear RoPE", "llama", values={
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    Row("Mistral", "mistral", values={"sliding_window": 4096}),
    Row("Ministral", "ministral", values={"head_dim": 128}),
    Row("Mixtral", "mixtral"),
    Row("Qwen2", "qwen2"),
    Row("Qwen2, windows", "qwen2", values={"use_sliding_window": True, "max_window_layers": 21}),
    Row("Qwen2-MoE", "qwen2_moe"),
    Row("Qwen2-MoE, windows", "qwen2_moe", values={
        "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}),
    Row("Qwen3, YaRN", "qwen3", values={**_GQA, "rope_parameters": _YARN}),
    Row("Qwen3-MoE", "qwen3_moe"),
    Row("Gemma", "gemma"),
    Row("Gemma 2", "gemma2"),
    Row("Gemma 3 (text)", "gemma3_text"),
    Row("Gemma 3, bidirectional", "gemma3_text", "refused", {"use_bidirectional_attention": True}),
    Row("gpt-oss", "gpt_oss"),
    Row("Phi", "phi"),
    Row("Phi-3 and 4, longrope", "phi3", values={
        "max_position_embeddings": 131072, "rope_parameters": _LONGROPE}),
    Row("PhiMoE", "phimoe"),
    Row("GLM-4", "glm4"),
    Row("GLM-4.5", "glm4_moe"),
    Row("SmolLM3", "smollm3"),
    Row("OLMo", "olmo"),
    Row("OLMo 2", "olmo2"),
    Row("OLMo 3", "olmo3"),
    Row("OLMoE", "olmoe"),
    Row("Granite", "granite"),
    Row("Granite MoE", "granitemoe"),
    Row("Granite 4.0 micro", "granitemoehybrid", values={
        "num_hidden_layers": 4, "num_local_experts": 0, "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope"}),
    Row("Granite 4.0, Mamba", "granitemoehybrid", "refused"),
    Row("Cohere", "cohere"),
    Row("Cohere 2", "cohere2"),
    Row("Nemotron-4, Minitron", "nemotron", values=_GQA),
    Row("Hunyuan", "hunyuan_v1_dense", values={"head_dim": 128}),
    Row("Hunyuan A13B", "hunyuan_v1_moe", values={"head_dim": 128}),
    Row("ERNIE 4.5", "ernie4_5"),
    Row("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Row("Seed-OSS", "seed_oss"),
    Row("EXAONE 4", "exaone4"),
    Row("Starcoder 2", "starcoder2"),
    Row("GPT-2", "gpt2"),
    Row("GPT-NeoX", "gpt_neox"),
    Row("Helium", "helium"),
    Row("Arcee", "arcee"),
    Row("Apertus", "apertus"),
    Row("dots.llm1", "dots1", values={
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6}),
    Row("MiniMax M2", "minimax_m2"),
    Row("DeepSeek V2", "deepseek_v2", "refused"),
    Row("DeepSeek V3", "deepseek_v3", "refused"),
    Row("Qwen3-Next", "qwen3_next", "refused"),
    Row("Llama 4 (text)", "llama4_text", "refused"),
    Row("Gemma 3n (text)", "gemma3n_text", "refused"),
    Row("DiffLlama", "diffllama", "refused"),
    Row("Doge", "doge", "refused"),
    Row("HRM", "hrm_text", "refused"),
    Row("Falcon, ALiBi", "falcon", "refused", {"alibi": True}),
    Row("Mamba", "mamba", "refused"),
    Row("Llama 3.x", "llama", form="bfloat16"),
    Row("Llama 3.x", "llama", form="sharded"),
    Row("Llama 3.x", "llama", form="pickle"),
    Row("Llama 3.x", "llama", "refused", form="tensors with scales"),
    Row("Llama 3.x", "llama", "refused", form="FP8 by ModelOpt"),
    Row("Llama 3.x", "llama", "refused", form="GPTQ"),
    Row("gpt-oss", "gpt_oss", "refused", form="MXFP4"),
    Row("Mistral", "mistral", "refused", form="tekken.json alone"),
]  # fmt: skip

# --- one row --------------------------------------------------------------------------------------


def run(row: Row, folder: Path, device: str = "cpu") -> Result:
    """Take `row` from a checkpoint in the empty `folder` to answers."""
    started = time.monotonic()
    config = row.config
    result = _run(row, config, folder, device)
    result.seconds = time.monotonic() - started
    if result.verdict == "exact":
        result.kv_bytes = kv_layout(config, BLOCK_SIZE, "bfloat16").token_bytes
    return result


def _run(row: Row, config: Any, folder: Path, device: str) -> Result:
    source = folder / "model"
    try:
        small_model_of(config, source, seed=3)
    except ModelError as failure:
        # What is refused from its config alone need not come in a small form.
        source.mkdir(exist_ok=True)
        config.save_pretrained(source)
        save_file({"weight": torch.ones(1)}, source / "model.safetensors")
        if row.expected == "exact":
            return Result("CRASH", str(failure).splitlines()[0])
    _save_tokenizer(source)
    FORMS[row.form](source)
    try:
        fetched = fetch_model(
            ModelConfig(id=str(source), allow_pickle=True), folder / "fetched", report=[].append
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
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
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


def _save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


# --- the table ------------------------------------------------------------------------------------


def table(results: Sequence[tuple[Row, Result]]) -> str:
    lines = [
        "| model | form | verdict | KV a token, bfloat16 | why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, result in results:
        memory = f"{result.kv_bytes / 1024:.1f} KiB" if result.kv_bytes else ""
        note = result.note.removeprefix("the torch engine cannot run this model: ")
        lines.append(f"| {row.name} | {row.form} | {result.verdict} | {memory} | {note} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="rows whose name or form contains this")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results = []
    for row in ROWS:
        if options.only.lower() not in f"{row.name} {row.form}".lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = run(row, Path(folder), options.device)
        print(
            f"{result.verdict:8} {result.seconds:5.1f} s  {row.name}, {row.form}", file=sys.stderr
        )
        results.append((row, result))
    print(table(results))
    unexpected = [(row, result) for row, result in results if result.verdict != row.expected]
    for row, result in unexpected:
        print(
            f"{row.name}, {row.form}: {result.verdict} instead of {row.expected}", file=sys.stderr
        )
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
