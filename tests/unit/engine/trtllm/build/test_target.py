"""What an engine is made for, and the flow that makes it."""

from __future__ import annotations

import pytest
from serving.config import parse
from serving.engine.trtllm.build.target import (
    Host,
    Parallelism,
    parallelism,
    resolve_flow,
    stamp,
)
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError
from serving.gpus import Gpu

H200 = Gpu("NVIDIA H200", 90, 150 * 10**9)
TRTLLM = {"backend": "tensorrt_llm"}


def test_roles_may_be_divided_differently() -> None:
    workers = {"tensor_parallel": {"prefill": 2}, "pipeline_parallel": {"decode": 4}}
    config = parse({"engine": TRTLLM, "workers": workers})
    assert parallelism(config, ("prefill", "decode")) == {
        "prefill": Parallelism(2, 1),
        "decode": Parallelism(1, 4),
    }
    assert Parallelism(2, 4).num_gpus == 8
    assert str(Parallelism(2, 4)) == "tp2-pp4"


@pytest.mark.parametrize("version", ["1.0.0", "1.3.0rc27"])
def test_auto_is_the_flow_that_every_version_has(version: str) -> None:
    assert resolve_flow(parse({"engine": TRTLLM}), parse_version(version)) == "pytorch"


def test_trtllm_build_is_refused_after_its_last_version() -> None:
    config = parse({"engine": TRTLLM | {"flow": "trtllm-build"}})
    assert resolve_flow(config, parse_version("1.2.1")) == "trtllm-build"
    with pytest.raises(ConfigError) as caught:
        resolve_flow(config, parse_version("1.3.0rc27"))
    assert caught.value.key == "engine.flow"
    assert "1.3.0rc27 has no trtllm-build" in caught.value.what
    assert "TensorRT-LLM 1.2" in caught.value.remedy


def test_stamp_leaves_out_unknown_entries() -> None:
    version = parse_version("1.2.1")
    host = Host(gpus=[H200, H200, Gpu("NVIDIA A100", 80)], driver="580.95.05")
    assert stamp(version, "13.0", host) == {
        "tensorrt_llm": "1.2.1",
        "gpus": "NVIDIA A100, NVIDIA H200",
        "compute_capability": "8.0, 9.0",
        "driver": "580.95.05",
        "cuda": "13.0",
    }
    assert stamp(version, "", Host()) == {"tensorrt_llm": "1.2.1"}


def test_smallest_known_memory_counts() -> None:
    assert Host(gpus=[H200, Gpu("small", 90, 10)]).memory_bytes == 10
    assert Host(gpus=[Gpu("unknown")]).memory_bytes == 0
