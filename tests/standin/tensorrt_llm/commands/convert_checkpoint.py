"""Test code. Stands in for `examples/models/core/*/convert_checkpoint.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tensorrt_llm import _contract
from tensorrt_llm.commands import files
from tensorrt_llm.version import __version__

_TYPES = {"tp_size": int, "pp_size": int, "workers": int}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in _contract.structure("convert_checkpoint")["flags"]:
        kind = _TYPES.get(flag, str)
        parser.add_argument(f"--{flag}", type=kind, default=1 if kind is int else None)
    args = parser.parse_args()
    if args.model_dir is None:
        parser.error("--model_dir is required")
    output = Path(args.output_dir or "tllm_checkpoint")
    files.link_model(Path(args.model_dir), output / files.MODEL)
    config = json.loads((output / files.MODEL / "config.json").read_text())
    heads = config["num_attention_heads"]
    assert heads % args.tp_size == 0, f"num_heads {heads} must divide by tp_size {args.tp_size}"
    content = {
        "architecture": (config.get("architectures") or ["LlamaForCausalLM"])[0],
        "dtype": args.dtype or "auto",
        "mapping": files.mapping(args.tp_size, args.pp_size),
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
    }
    files.write(output / "config.json", content)
    for rank in range(args.tp_size * args.pp_size):
        (output / f"rank{rank}.safetensors").write_text("a stand-in has no converted weights\n")
    print(f"[TensorRT-LLM] {__version__}: converted to {output}")


if __name__ == "__main__":
    main()
