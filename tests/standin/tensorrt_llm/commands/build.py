"""Test code. Stands in for `trtllm-build`: its flags, and an engine folder without an engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tensorrt_llm import _contract
from tensorrt_llm.commands import files
from tensorrt_llm.version import __version__

_PLUGIN_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_KV_CACHE_TYPES = ("continuous", "paged", "disabled")


def main() -> None:
    args = _parser().parse_args()
    checkpoint, output = Path(args.checkpoint_dir or ""), Path(args.output_dir)
    pretrained = json.loads((checkpoint / "config.json").read_text())
    files.link_model(checkpoint / files.MODEL, output / files.MODEL)
    plugin_flags = _contract.structure("trtllm_build")["plugin_flags"]
    given = {name: value for name, value in vars(args).items() if value is not None}
    build_config: dict[str, Any] = {
        name: given.get(name)
        for name in ("max_batch_size", "max_input_len", "max_num_tokens", "max_beam_width")
    }
    model = json.loads((output / files.MODEL / "config.json").read_text())
    build_config["max_seq_len"] = args.max_seq_len or model["max_position_embeddings"]
    build_config["gather_generation_logits"] = args.gather_generation_logits
    build_config["plugin_config"] = {name: given[name] for name in plugin_flags if name in given}
    content = {
        "version": __version__,
        "pretrained_config": pretrained,
        "build_config": build_config,
    }
    files.write(output / "config.json", content)
    for rank in range(pretrained["mapping"]["world_size"]):
        (output / f"rank{rank}.engine").write_text("a stand-in has no compiled engine\n")
    print(f"[TensorRT-LLM] {__version__}: Build complete, {output}")


def _parser() -> argparse.ArgumentParser:
    known = _contract.structure("trtllm_build")
    defaults: Any = known["defaults"]
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for flag in known["flags"]:
        kind = int if flag.startswith(("max_", "opt_", "workers")) else str
        choices = _KV_CACHE_TYPES if flag == "kv_cache_type" else None
        parser.add_argument(f"--{flag}", type=kind, choices=choices, default=defaults.get(flag))
    for flag in known["switches"]:
        parser.add_argument(f"--{flag}", action="store_true")
    for flag in known["plugin_flags"]:
        if flag == "tokens_per_block":
            parser.add_argument(f"--{flag}", type=int, default=defaults[flag])
        else:
            choices = _PLUGIN_DTYPES if flag.endswith("_plugin") else ("enable", "disable")
            parser.add_argument(f"--{flag}", choices=choices)
    return parser


if __name__ == "__main__":
    main()
