"""A podman that is a shell script, and the answer of a probe inside its container."""

from __future__ import annotations

import json

import msgspec
from serving.deploy.checks import container_probe
from serving.deploy.checks.container import ProbeFacts

GIB = 1024**3
FACTS = ProbeFacts(
    python="3.12.3",
    cuda_version="13.1.0",
    driver="590.44.01",
    devices=2,
    memlock=-1,
    shm_bytes=8 * GIB,
    infiniband=False,
    cuda_init=0,
    cuda_driver=13010,
    cuda_gpus=2,
)
ID = "sha256:" + "ab" * 32


def podman(on_run: str = "", on_inspect: str = f"echo {ID} []", on_pull: str = "") -> str:
    return (
        "case $1 in\n"
        "info) echo 4.3.1 ;;\n"
        f"image) {on_inspect} ;;\n"
        f"pull) {on_pull} ;;\n"
        f"run) {on_run or probe_answer(FACTS)} ;;\n"
        "esac"
    )


def probe_answer(facts: ProbeFacts, *imports: dict[str, str]) -> str:
    """A banner, as NVIDIA's images print one, and what the probe prints."""
    answers = [msgspec.to_builtins(facts), *(imports or ({"module": "serving", "version": ""},))]
    lines = [container_probe.MARK + json.dumps(each) for each in answers]
    return "\n".join(["echo '== TensorRT-LLM =='", *(f"echo '{line}'" for line in lines)])
