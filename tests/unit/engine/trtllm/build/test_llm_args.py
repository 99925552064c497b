"""The YAML that each role's `LLM` is started with, version by version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving.config import parse
from serving.engine.trtllm.build.llm_args import REQUIRED, render
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[4] / "standin"))

from install import load_contract

CONTRACT = load_contract()
VERSIONS: list[str] = CONTRACT.versions()
ROLES = ("agg", "prefill", "decode")
SECTIONS = {
    "kv_cache_config": "KvCacheConfig",
    "cache_transceiver_config": "CacheTransceiverConfig",
    "scheduler_config": "SchedulerConfig",
}


def text(role: Any = "prefill", version: str = "1.3.0rc27", **changed: Any) -> str:
    flow = changed.pop("flow", "pytorch")
    spread = Parallelism(*changed.pop("spread", (1, 1)))
    engine = {"backend": "tensorrt_llm", "block_size": 32, "max_model_len": 2048}
    engine |= changed.pop("engine", {})
    return render(
        parse({"engine": engine, **changed}),
        role,
        version=parse_version(version),
        flow=flow,
        spread=spread,
        dtype="bfloat16",
        model="." if flow == "pytorch" else "trtllm-tp1-pp1",
    )


def rendered(role: Any = "prefill", version: str = "1.3.0rc27", **changed: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text(role, version, **changed))
    return content


def dotted(content: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{path}{key}.")
        elif key != REQUIRED:
            yield f"{path}{key}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("flow", ["pytorch", "trtllm-build"])
def test_every_argument_exists_in_the_version(version: str, role: str, flow: str) -> None:
    classes = CONTRACT.classes(version)
    args_class = "TorchLlmArgs" if flow == "pytorch" else "TrtLlmArgs"
    if args_class not in classes:
        assert version.startswith("1.3")
        return
    full = {"kv_cache_tokens": 4096, "host_cache_bytes": 10**9}
    content = rendered(role, version, flow=flow, engine=full)
    for name in dotted(content):
        section, _, key = name.partition(".")
        assert section in classes[args_class], name
        if key:
            assert key in classes[SECTIONS[section]], name


def test_sizes_come_from_the_config() -> None:
    content = rendered(
        "decode",
        engine={"max_model_len": 4096, "max_batch_size": 8, "max_num_batched_tokens": 1024},
        spread=(4, 2),
    )
    assert content["max_seq_len"] == content["max_input_len"] == 4096
    assert (content["max_batch_size"], content["max_num_tokens"]) == (8, 1024)
    assert (content["tensor_parallel_size"], content["pipeline_parallel_size"]) == (4, 2)
    assert content["model"] == "."
    assert content["dtype"] == "bfloat16"


def test_a_step_has_room_for_a_token_of_each_request() -> None:
    content = rendered(engine={"max_batch_size": 64, "max_num_batched_tokens": 16})
    assert content["max_num_tokens"] == 64


@pytest.mark.parametrize("version", VERSIONS)
def test_settings_against_known_hangs_are_there(version: str) -> None:
    prefill, decode, agg = (rendered(role, version) for role in ("prefill", "decode", "agg"))
    assert prefill["disable_overlap_scheduler"] is True
    assert "disable_overlap_scheduler" not in decode
    assert prefill["cuda_graph_config"] is None
    assert "cuda_graph_config" not in decode
    assert "cache_transceiver_config" not in agg
    for content in (prefill, decode):
        assert content["cache_transceiver_config"]["max_tokens_in_buffer"] >= 2048
    for content in (prefill, decode, agg):
        assert content["kv_cache_config"]["enable_block_reuse"] is True
        assert content["kv_cache_config"]["event_buffer_max_size"] > 0
        assert content["enable_chunked_prefill"] is True
        assert content["enable_iter_perf_stats"] is True
        policy = content["scheduler_config"]["capacity_scheduler_policy"]
        assert policy == "GUARANTEED_NO_EVICT"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.0.0", {"backend": "ucx", "max_tokens_in_buffer": 2048}),
        (
            "1.2.1",
            {"backend": "UCX", "max_tokens_in_buffer": 2048, "kv_transfer_timeout_ms": 60000},
        ),
        (
            "1.3.0rc27",
            {
                "backend": "UCX",
                "transceiver_runtime": "CPP",
                "max_tokens_in_buffer": 2048,
                "kv_transfer_timeout_ms": 60000,
            },
        ),
    ],
)
def test_transceiver_is_named_as_the_version_does(version: str, expected: dict[str, Any]) -> None:
    assert rendered("decode", version)["cache_transceiver_config"] == expected


def test_transport_and_timeout_are_those_of_the_config() -> None:
    moving = {"transport": "nixl", "hold_s": 5, "transfer_s": 90}
    transceiver = rendered(kv_transfer=moving)["cache_transceiver_config"]
    assert transceiver["backend"] == "NIXL"
    assert transceiver["kv_transfer_timeout_ms"] == 90_000


def test_both_ends_agree_on_the_transceiver() -> None:
    ends = [rendered(role)["cache_transceiver_config"] for role in ("prefill", "decode")]
    assert ends[0] == ends[1]


def test_oldest_version_samples_and_has_blocks_of_one_size() -> None:
    assert rendered("agg", "1.0.0")["enable_mixed_sampler"] is True
    assert "enable_mixed_sampler" not in rendered("agg", "1.1.0")
    assert "tokens_per_block" not in rendered("agg", "1.0.0")["kv_cache_config"]
    with pytest.raises(ConfigError) as caught:
        rendered("agg", "1.0.0", engine={"block_size": 16})
    assert caught.value.key == "engine.block_size"
    assert (
        rendered("agg", "1.1.0", engine={"block_size": 16})["kv_cache_config"]["tokens_per_block"]
        == 16
    )


def test_kv_pool_takes_its_limits() -> None:
    plain = rendered()["kv_cache_config"]
    assert not {"max_tokens", "host_cache_size", "dtype"} & set(plain)
    kv = rendered(
        engine={"kv_cache_tokens": 4096, "host_cache_bytes": 7},
        tensorrt_llm={"kv_cache_dtype": "fp8"},
    )["kv_cache_config"]
    assert (kv["max_tokens"], kv["host_cache_size"], kv["dtype"]) == (4096, 7, "fp8")


def test_guided_decoding_needs_the_tokenizer() -> None:
    content = rendered()
    assert content["guided_decoding_backend"] == "xgrammar"
    assert content["skip_tokenizer_init"] is False
    content = rendered(tensorrt_llm={"guided_decoding": "none"})
    assert "guided_decoding_backend" not in content
    assert content["skip_tokenizer_init"] is True


def test_arguments_that_are_built_into_an_engine_are_not_written() -> None:
    content = rendered("decode", "1.2.1", flow="trtllm-build")
    assert content["model"] == "trtllm-tp1-pp1"
    assert not {"dtype", "max_seq_len", "max_batch_size", "enable_iter_perf_stats"} & set(content)
    assert "tokens_per_block" not in content["kv_cache_config"]


def test_backend_that_makes_logprobs_of_logits_keeps_them() -> None:
    assert rendered("agg", "1.2.1", flow="trtllm-build")["gather_generation_logits"] is True
    assert "gather_generation_logits" not in rendered("agg", "1.2.1")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"guided_decoding": "llguidance"}, "guided_decoding"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    ],
)
def test_built_engine_lacks_some_choices(setting: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered("agg", "1.2.1", flow="trtllm-build", tensorrt_llm=setting)
    assert caught.value.key == f"tensorrt_llm.{key}"


def test_own_arguments_win_and_are_required() -> None:
    own = {
        "print_iter_log": True,
        "stream_interval": 4,
        "kv_cache_config": {"free_gpu_memory_fraction": 1e-05, "enable_partial_reuse": False},
        "cuda_graph_config": {"batch_sizes": [1, 2], "enable_padding": True},
    }
    content = rendered("prefill", tensorrt_llm={"llm_args": own})
    assert content["print_iter_log"] is True
    assert content["kv_cache_config"]["free_gpu_memory_fraction"] == 1e-05
    assert content["kv_cache_config"]["enable_block_reuse"] is True
    assert content["cuda_graph_config"] == {"batch_sizes": [1, 2], "enable_padding": True}
    assert set(content[REQUIRED]) == {
        "print_iter_log",
        "stream_interval",
        "kv_cache_config.free_gpu_memory_fraction",
        "kv_cache_config.enable_partial_reuse",
        "cuda_graph_config.batch_sizes",
        "cuda_graph_config.enable_padding",
    }
    assert rendered()[REQUIRED] == []


@pytest.mark.parametrize(
    ("own", "decides"),
    [
        ({"model": "x"}, "model.id"),
        ({"tensor_parallel_size": 2}, "workers.tensor_parallel"),
        ({"max_seq_len": 1}, "engine.max_model_len"),
        ({"kv_cache_config": {"tokens_per_block": 64}}, "engine.block_size"),
    ],
)
def test_owned_argument_is_refused_with_its_config_key(own: dict[str, Any], decides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(tensorrt_llm={"llm_args": own})
    assert f"`{decides}`" in caught.value.what


def test_settings_come_with_their_reasons() -> None:
    lines = text("prefill").splitlines()
    for key in (
        "disable_overlap_scheduler",
        "  backend",
        "  event_buffer_max_size",
        "  max_tokens_in_buffer",
    ):
        [at] = [number for number, line in enumerate(lines) if line.startswith(f"{key}:")]
        assert lines[at - 1].lstrip().startswith("# "), key


def test_odd_values_survive_the_yaml() -> None:
    own = {"env_overrides": {"A B": "yes", "n": None, "text": "a: b # c", "é": "\n"}, "empty": {}}
    content = rendered(tensorrt_llm={"llm_args": own})
    assert content["env_overrides"] == own["env_overrides"]
    assert content["empty"] == {}
