"""What a person reads when TensorRT-LLM cannot run here: one paragraph each, with what and why
and what to change.

Each failure comes the way it would: from the plan, from a check, from a build, from a worker that
starts. What these say in detail is tested where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from huggingface_hub.errors import GatedRepoError
from serving.config import Config, parse
from serving.deploy.checks.container import check_container, judge_gpus
from serving.deploy.checks.findings import Finding, conclude, judge
from serving.deploy.checks.tensorrt_llm import judge_tensorrt_llm
from serving.deploy.model.hub_errors import explain_hub_error
from serving.deploy.planning.gpu_assignment import require_enough_gpus, usable_gpus
from serving.engine.trtllm.build.memory import require_memory
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.build.tensorrt_flow import build_engines
from serving.engine.trtllm.failures import explain_start
from serving.engine.trtllm.visible_gpus import check_gpus
from serving.errors import OperatorError
from serving.gpus import Gpu
from unit.deploy.checks.fake_podman import FACTS
from unit.deploy.checks.fake_podman import podman as podman_script
from unit.deploy.checks.h100 import H100
from unit.deploy.fake_programs import Script
from unit.engine.trtllm.build.checkpoints import checkpoint, config
from unit.engine.trtllm.build.library_fakes import FakeRun

HERE = Gpu("NVIDIA H100 80GB HBM3", 90)
GIB = 1024**3


def checked(name: str, findings: list[Finding]) -> None:
    conclude(judge(name, findings), Path("check.json"), report=print)


def on_gpus(driver: str) -> list[Finding]:
    return judge_tensorrt_llm(
        [(0,)], [H100], driver=driver, version=(1, 2), dtype="bfloat16", weights=None
    )


def in_container(**changes: Any) -> list[Finding]:
    return judge_gpus(msgspec.structs.replace(FACTS, **changes), 1)


def started(exc: Exception) -> None:
    raise explain_start(exc)


def built(said: str) -> None:
    build_engines(
        Path("engine"),
        checkpoint(),
        config(flow="trtllm-build"),
        [Parallelism()],
        run=FakeRun(answer=lambda argv: (1, said)),
        report=print,
    )


def loaded(memory_bytes: int) -> None:
    parallelism: Any = {"agg": Parallelism()}
    require_memory(
        checkpoint(),
        config(max_model_len=131072),
        parallelism,
        dtype="bfloat16",
        memory_bytes=memory_bytes,
    )


def placed(tensor: int, num_gpus: int) -> None:
    sizes: Any = {"agg": tensor}
    require_enough_gpus({"agg": 1}, sizes, range(num_gpus), may_share=False)


def gated() -> None:
    answer = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/x/y"))
    hub: Any = SimpleNamespace(endpoint="https://hub.example", token=None)
    raise explain_hub_error(
        GatedRepoError("403 Client Error", response=answer), parse_model("x/y").model, hub
    )


def parse_model(name: str) -> Config:
    return parse({"model": {"id": name}})


FAILURES: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    # name: (how it comes about, what, why, what to change)
    "no GPU, in the plan": (
        lambda: usable_gpus(None, [], "tensorrt_llm"),
        *("there is no GPU to use", "TensorRT-LLM runs on NVIDIA GPUs", "`engine.backend: torch`"),
    ),
    "no GPU, in the check": (
        lambda: checked("gpu", on_gpus("")),
        *("no NVIDIA driver answers", "needs NVIDIA GPUs", "engine.backend to torch"),
    ),
    "no GPU, in the container": (
        lambda: checked("container", in_container(devices=0)),
        *("no GPU is visible in the container", "workers need 1", "nvidia-container-toolkit"),
    ),
    "no GPU, in the worker": (
        lambda: check_gpus([], 1, {}),
        *("this worker sees none", "computes on NVIDIA GPUs", "`engine.backend: torch`"),
    ),
    "no GPU, in the library": (
        lambda: started(RuntimeError("No CUDA GPUs are available")),
        *("could not be started", "it sees no NVIDIA GPU", "`engine.backend: torch`"),
    ),
    "driver too old, in the check": (
        lambda: checked("gpu", on_gpus("570.86.15")),
        *("570.86.15 is too old", "a CUDA that needs 580", "install driver 580 or newer"),
    ),
    "driver too old, in the container": (
        lambda: checked("container", in_container(cuda_init=803, driver="570.86.15")),
        *("570.86.15 is too old", "CUDA 13.1.0, which needs 580", "container.base_tag"),
    ),
    "driver too old, in the library": (
        lambda: started(RuntimeError("CUDA driver version is insufficient for CUDA runtime")),
        *("could not be started", "the NVIDIA driver is too old", "`container.base_tag`"),
    ),
    "out of memory, before": (
        lambda: loaded(24 * GIB),
        *("each agg worker needs about", "16 GB of weights", "`engine.max_model_len`"),
    ),
    "out of memory, while it compiles": (
        lambda: built("torch.OutOfMemoryError: CUDA out of memory."),
        *("convert_checkpoint.py failed", "CUDA out of memory", "`engine.max_batch_size`"),
    ),
    "out of memory, in the library": (
        lambda: started(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        *("could not be started", "the GPU's memory does not hold", "`engine.max_batch_size`"),
    ),
    "engine for another GPU, in the worker": (
        lambda: check_gpus([HERE], 1, {"compute_capability": "8.0"}),
        *("built for compute capability 8.0", "(NVIDIA H100 80GB HBM3) have 9.0", "it rebuilds"),
    ),
    "engine for another GPU, in the library": (
        lambda: started(RuntimeError("no kernel image is available for execution on the device")),
        *("could not be started", "it was built for another one", "it rebuilds"),
    ),
    "TP larger than the GPUs, in the plan": (
        lambda: placed(4, 2),
        *("each agg worker needs 4 GPUs", "but 2 can be handed out", "`workers.tensor_parallel`"),
    ),
    "TP larger than the GPUs, in the worker": (
        lambda: check_gpus([HERE], 4, {}),
        *("among 4 GPUs", "and sees 1", "`workers.tensor_parallel`"),
    ),
    "TP larger than the GPUs, in the library": (
        lambda: started(RuntimeError("Only 2 GPUs are available, but 4 are required.")),
        *("among 4 GPUs", "2 are visible to it", "`workers.tensor_parallel`"),
    ),
    "gated model": (
        gated,
        *("x/y is gated", "its owner grants access by request", "https://hub.example/x/y"),
    ),
}


def paragraph(error: OperatorError) -> tuple[str, str]:
    """What is wrong, and what to change. One paragraph: no empty line, no traceback."""
    what, arrow, remedy = str(error).partition("\n  -> ")
    assert arrow
    assert "Traceback" not in what
    assert all(line.strip() for line in str(error).splitlines())
    assert "\n" not in remedy
    return what, remedy


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_one_paragraph(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fail, what, why, change = FAILURES[name]
    with pytest.raises(OperatorError) as caught:
        fail()
    said, remedy = paragraph(caught.value)
    assert what in said
    assert why in said
    assert change in remedy


@pytest.mark.parametrize(
    ("pull", "says", "change"),
    [
        (False, "x:1: image not known", "podman pull registry.example/x:1"),
        (True, "unauthorized: authentication required", "podman login registry.example"),
        (True, "dial tcp: lookup registry.example: no such host", "set HTTPS_PROXY for podman"),
    ],
    ids=["image missing", "no access to the registry", "registry out of reach"],
)
def test_image_that_cannot_be_had_is_one_paragraph(
    pull: bool,
    says: str,
    change: str,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    failing = f"echo 'Error: {says}' >&2; exit 125"
    script("podman", podman_script(on_inspect=failing, on_pull=failing))
    container = {"runtime": "podman", "image": "registry.example/x:1", "pull": pull}
    with pytest.raises(OperatorError) as caught:
        checked("container", check_container(parse({"container": container}), [], print))
    said, remedy = paragraph(caught.value)
    assert said == f"container failed: image: podman says: Error: {says}"
    assert change in remedy
