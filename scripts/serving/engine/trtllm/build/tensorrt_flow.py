"""The flow `trtllm-build`: a checkpoint is converted, and compiled into TensorRT engines.

Exists up to TensorRT-LLM 1.2. Flags are those of examples/models/core/*/convert_checkpoint.py and
of tensorrt_llm/commands/build.py with the plugin arguments of tensorrt_llm/plugin/plugin.py. An
engine is compiled for one division among GPUs; roles that are divided alike share one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from serving.config import Config
from serving.engine.trtllm.build.checkpoint import CONVERTERS, Checkpoint
from serving.engine.trtllm.build.installed import PYTHON, RunProgram
from serving.engine.trtllm.build.target import Parallelism
from serving.errors import ModelError, OperatorError
from serving.progress import Report

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
_OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "CUDA_ERROR_OUT_OF_MEMORY")
_LAST_LINES = 8


def folder(spread: Parallelism) -> str:
    """Where the engine for `spread` is, inside the engine's folder."""
    return f"trtllm-{spread}"


def build_engines(
    staging: Path,
    checkpoint: Checkpoint,
    config: Config,
    spreads: Sequence[Parallelism],
    *,
    run: RunProgram,
    report: Report,
) -> None:
    """One folder for each of `spreads` in `staging`, which holds the Hugging Face checkpoint.

    Raises ModelError for a quantized one, OperatorError when a tool fails.
    """
    if checkpoint.quantization is not None:
        raise ModelError(
            f"trtllm-build is only driven here for unquantized weights, and these are "
            f"{checkpoint.quantization.algorithm}",
            remedy="remove `engine.flow`: the PyTorch backend loads them as they are",
        )
    for spread in spreads:
        converted, target = staging / f".converted-{spread}", staging / folder(spread)
        report(f"converting the checkpoint for {spread}")
        _require(convert_command(staging, converted, checkpoint, config, spread), run, report)
        report(f"compiling TensorRT engines for {spread}: this takes minutes")
        _require(build_command(converted, target, config, spread), run, report)
        shutil.rmtree(converted)
        built = sorted(target.glob("rank*.engine"))
        if not (target / "config.json").exists() or len(built) != spread.num_gpus:
            raise OperatorError(
                f"trtllm-build ended well but left {len(built)} engines in {target}, not "
                f"{spread.num_gpus}",
                remedy="look at logs/build_engine.log",
            )
        for name in _COMPANIONS:  # it looks for its tokenizer beside the engine
            if (staging / name).exists():
                shutil.copyfile(staging / name, target / name)


def convert_command(
    model_dir: Path, output_dir: Path, checkpoint: Checkpoint, config: Config, spread: Parallelism
) -> list[str]:
    family = CONVERTERS[checkpoint.architecture]
    script = f"{config.tensorrt_llm.examples_dir}/models/core/{family}/convert_checkpoint.py"
    return [
        *(PYTHON, script),
        *("--model_dir", str(model_dir)),
        *("--output_dir", str(output_dir)),
        *("--dtype", config.engine.dtype),
        *("--tp_size", str(spread.tensor)),
        *("--pp_size", str(spread.pipeline)),
    ]


def build_command(
    checkpoint_dir: Path, output_dir: Path, config: Config, spread: Parallelism
) -> list[str]:
    engine = config.engine
    tokens = max(engine.step_tokens(), engine.max_batch_size)
    return [
        "trtllm-build",
        *("--checkpoint_dir", str(checkpoint_dir)),
        *("--output_dir", str(output_dir)),
        *("--max_batch_size", str(engine.max_batch_size)),
        *("--max_input_len", str(engine.resolved_context)),
        *("--max_seq_len", str(engine.resolved_context)),
        *("--max_num_tokens", str(tokens)),
        *("--max_beam_width", "1"),
        *("--gemm_plugin", engine.dtype),
        *("--gpt_attention_plugin", engine.dtype),
        *("--kv_cache_type", "paged"),
        *("--tokens_per_block", str(engine.block_size)),
        # Without these two no block is reused, and no prompt is prefilled in chunks.
        *("--context_fmha", "enable"),
        *("--use_paged_context_fmha", "enable"),
        # Any request may ask for log-probabilities, and this backend makes them of logits.
        "--gather_generation_logits",
        *("--workers", str(spread.num_gpus)),
    ]


def _require(command: list[str], run: RunProgram, report: Report) -> None:
    done = run(command, report=report)
    if done.returncode == 0:
        return
    tool = Path(command[1] if command[0] == PYTHON else command[0]).name
    lines = [line for line in done.stdout.splitlines() if line.strip()][-_LAST_LINES:]
    output = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
    remedy = "fix the problem that it names; logs/build_engine.log has the whole output"
    if any(sign in done.stdout for sign in _OUT_OF_MEMORY):
        remedy = (
            "lower `engine.max_num_batched_tokens`, `engine.max_batch_size` or "
            "`engine.max_model_len`, or free the GPU (`nvidia-smi` lists the processes that hold its memory)"
        )
    elif "can't open file" in done.stdout:
        remedy = "set `tensorrt_llm.examples_dir` to the `examples` folder of that version's source"
    raise OperatorError(
        f"{tool} failed with exit status {done.returncode}. The end of its output:\n{output}",
        remedy=remedy,
    )
