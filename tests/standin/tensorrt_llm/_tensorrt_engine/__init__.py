"""Test code. `LLM` of the TensorRT flow: loads what `trtllm-build` left. Gone in 1.3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorrt_llm import _contract
from tensorrt_llm._settings import Settings, read, replaced
from tensorrt_llm.commands.files import MODEL
from tensorrt_llm.llmapi.llm import BaseLLM

if "TrtLlmArgs" not in _contract.classes(_contract.current_version()):
    raise ModuleNotFoundError(
        f"No module named {__name__!r}: the TensorRT backend was removed", name=__name__
    )

from tensorrt_llm.llmapi.llm_args import TrtLlmArgs

__all__ = ["LLM"]


class LLM(BaseLLM):
    """`model` is an engine's folder; what was built into it cannot be changed any more."""

    _arguments = TrtLlmArgs

    def _load_settings(self, folder: Path) -> Settings:
        config = _engine_config(folder)
        args, mapping = self.args, config["pretrained_config"]["mapping"]
        sizes = {"tp": args.tensor_parallel_size, "pp": args.pipeline_parallel_size}
        for name, size in sizes.items():
            built = mapping[f"{name}_size"]
            if size not in (1, built):
                raise ValueError(
                    f"{name}_size {size} is not consistent with the engine's {name}_size {built}"
                )
        if args.kv_cache_config.dtype != "auto":
            raise AssertionError("KvCacheConfig.dtype is not supported by the TensorRT backend")
        args.tensor_parallel_size, args.pipeline_parallel_size = (
            mapping["tp_size"],
            mapping["pp_size"],
        )
        built_config = config["build_config"]
        for name in ("max_batch_size", "max_num_tokens"):
            asked = getattr(args, name)
            if "max_" in name and name in args.model_fields_set and asked > built_config[name]:
                raise ValueError(
                    f"{name} [{asked}] is greater than build_config.{name} "
                    f"[{built_config[name]}] in build_config"
                )
        plugins = built_config["plugin_config"]
        settings = read(args, folder / MODEL)
        return replaced(
            settings,
            max_seq_len=built_config["max_seq_len"],
            max_batch_size=min(settings.max_batch_size, built_config["max_batch_size"]),
            max_num_tokens=min(settings.max_num_tokens, built_config["max_num_tokens"]),
            tokens_per_block=plugins["tokens_per_block"],
            # Both need the paged attention that the engine was built with.
            block_reuse=settings.block_reuse and plugins.get("use_paged_context_fmha") == "enable",
            stats=True,
        )

    def _prepared(self, params: Any) -> Any:
        params = super()._prepared(params)
        if params.logprobs and not self.args.gather_generation_logits:
            raise ValueError(
                f"`sampling_params.logprobs={params.logprobs}` requires "
                "`gather_generation_logits=True` to be passed explicitly to the `LLM()` constructor."
            )
        return params


def _engine_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "pretrained_config" not in content or "build_config" not in content:
        raise ValueError(
            f"Invalid engine config found from {folder}, please use the corresponding version of "
            "trtllm-build to build the engine."
        )
    world_size = content["pretrained_config"]["mapping"]["world_size"]
    for rank in range(world_size):
        if not (folder / f"rank{rank}.engine").exists():
            raise FileNotFoundError(folder / f"rank{rank}.engine")
    if content["version"] != _contract.current_version():
        raise RuntimeError(
            f"The engine was built with {content['version']}, this is "
            f"{_contract.current_version()}: deserialization failed, version mismatch"
        )
    return content
