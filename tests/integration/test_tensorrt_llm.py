"""`engine.backend: tensorrt_llm` on the real model, with a stand-in for the library.

The stand-in has the library's classes, signatures and traps, and the torch engine's tokens; see
`tests/standin/`. What it cannot show is TensorRT-LLM itself.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from integration.deployment import DEFAULT_MODEL, Deployment, running, share_results
from standin.install import install

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 7 times 8?\nA:",
    "Les trois mousquetaires sont",
    "The following is a careful and detailed story about a lighthouse keeper. " * 8,
]
NUM_ABORTS = 100


def answers(service: Deployment) -> list[tuple[str, int]]:
    """Greedy text and number of tokens for each prompt, first alone, then all at once."""

    def ask(prompt: str) -> tuple[str, int]:
        answer = service.complete(prompt, max_tokens=24)
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    alone = [ask(prompt) for prompt in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, PROMPTS)) == alone
    return alone


@pytest.fixture(scope="module")
def from_torch(
    tmp_path_factory: pytest.TempPathFactory, default_results: Path
) -> list[tuple[str, int]]:
    """What the torch engine answers."""
    deployment = Deployment(tmp_path_factory.mktemp("torch"))
    share_results(default_results, deployment.directory / "results")
    with running(deployment, "serve_agg"):
        return answers(deployment)


@pytest.fixture(scope="module")
def models(default_results: Path) -> Path:
    """The downloaded model, without any engine."""
    return default_results / "models"


def deployment_with(directory: Path, models: Path, version: str, **sections: Any) -> Deployment:
    engine = {
        "backend": "tensorrt_llm",
        "device": "cpu",
        "block_size": 32,  # the only size of 1.0
        **sections.pop("engine", {}),
    }
    deployment = Deployment(directory, engine=engine, **sections)
    share_results(models, directory / "results" / "models")
    library = install(directory / "library", version)
    deployment.environment = {
        "PYTHONPATH": str(library),
        "PATH": os.pathsep.join([str(library / "bin"), os.environ["PATH"]]),
    }
    return deployment


def idle(state: dict[str, Any]) -> bool:
    return bool(state["instances"]) and all(
        row["active_blocks"] == 0 and row["num_running"] == 0 and row["num_waiting"] == 0
        for row in state["instances"]
    )


@pytest.mark.parametrize(
    ("target", "version"),
    [("serve_agg", "1.0.0"), ("serve_disagg", "1.2.1")],
)
def test_topology_passes_the_smoke_test_with_the_tokens_of_torch(
    target: str,
    version: str,
    tmp_path: Path,
    models: Path,
    from_torch: list[tuple[str, int]],
) -> None:
    deployment = deployment_with(tmp_path, models, version)
    with running(deployment, target):
        assert "smoke test passed" in deployment.snakemake("smoke_test").stdout
        assert answers(deployment) == from_torch


def test_agg_router_sends_a_prompt_where_it_is_cached(
    tmp_path: Path, models: Path, from_torch: list[tuple[str, int]]
) -> None:
    deployment = deployment_with(tmp_path, models, "1.1.0", workers={"agg": 2})
    with running(deployment, "serve_agg_router"):
        assert "smoke test passed" in deployment.snakemake("smoke_test").stdout
        assert answers(deployment) == from_torch
        for number in range(4):
            prompt = f"Chapter {number}. " + PROMPTS[-1]
            cold, *warm = (
                deployment.complete(prompt, max_tokens=2)["usage"]["prompt_tokens_details"]
                for _ in range(3)
            )
            assert cold["cached_tokens"] < 64
            assert all(each["cached_tokens"] >= 64 for each in warm), (number, warm)


@pytest.fixture(scope="module")
def disagg_router(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("disagg-router")
    deployment = deployment_with(directory, models, "1.3.0rc27", kv_transfer={"transfer_s": 8.0})
    with running(deployment, "serve_disagg_router"):
        yield deployment


def test_disagg_router_passes_the_smoke_test_with_the_tokens_of_torch(
    disagg_router: Deployment, from_torch: list[tuple[str, int]]
) -> None:
    assert "smoke test passed" in disagg_router.snakemake("smoke_test").stdout
    assert answers(disagg_router) == from_torch
    state = disagg_router.ready()
    assert sum(row["local_prefill_fallbacks"] for row in state["instances"]) == 0


def test_a_hundred_aborts_in_any_phase_leave_no_block_behind(disagg_router: Deployment) -> None:
    chance = random.Random(7)
    disagg_router.wait("idle", idle)
    moments = [chance.uniform(0.0, 1.2) for _ in range(NUM_ABORTS)]

    def leave_after(number: int) -> None:
        body = {
            "model": DEFAULT_MODEL,
            "prompt": f"Story {number}: " + PROMPTS[-1][: chance.randrange(20, 400)],
            "max_tokens": 64,
            "ignore_eos": True,
            "stream": True,
        }
        timeout = httpx.Timeout(30, read=max(0.01, moments[number]))
        try:
            with httpx.stream(
                "POST", f"{disagg_router.url}/v1/completions", json=body, timeout=timeout
            ) as response:
                lines = response.iter_lines()
                for _ in range(chance.randrange(1, 12)):
                    next(lines, None)
        except httpx.TimeoutException:
            return  # left while it waited

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(leave_after, range(NUM_ABORTS)))
    disagg_router.wait("every block free again", idle, deadline_s=60)
    assert "smoke test passed" in disagg_router.snakemake("smoke_test").stdout


def test_second_serve_does_nothing_and_a_new_limit_rebuilds_and_restarts(
    disagg_router: Deployment,
) -> None:
    before = disagg_router.pids()
    assert "Nothing to be done" in disagg_router.snakemake("serve_disagg_router").stdout
    assert disagg_router.pids() == before
    disagg_router.config["engine"]["max_batch_size"] = 8
    done = disagg_router.snakemake("serve_disagg_router")
    assert "build_engine" in done.stdout
    after = disagg_router.pids()
    assert {name for name in before if before[name] != after[name]} >= {
        "worker-prefill-0",
        "worker-decode-0",
    }
    assert disagg_router.complete("The capital of France is")["choices"][0]["text"]


def test_library_that_is_missing_is_one_paragraph(tmp_path: Path, models: Path) -> None:
    deployment = deployment_with(tmp_path, models, "1.3.0rc27")
    deployment.environment = {}
    done = deployment.snakemake("serve_disagg", check=False)
    assert done.returncode != 0
    assert "tensorrt_llm" in done.stdout
    assert "Traceback" not in done.stdout
    deployment.stop()
