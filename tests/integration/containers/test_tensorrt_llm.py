"""`engine.backend: tensorrt_llm` on the real model, with a stand-in for the library.

The stand-in has the library's classes, signatures and traps, and the torch engine's tokens; see
`tests/standin/`. What it cannot show is TensorRT-LLM itself.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from integration.deployment import DEFAULT_MODEL, Deployment, running, share_results
from integration.tiny_model import save_tiny_model
from standin.install import install

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Les trois mousquetaires sont",
    "The following is a careful and detailed story about a lighthouse keeper. " * 8,
]
NUM_ABORTS = 100
BOOKS, SLOW_FETCH, SLOW_FETCH_S = "books", "slow-fetch", 0.3
"""In a deployment's folder: where the stand-in writes what it holds, and how long a fetch waits."""


def answers(service: Deployment) -> list[tuple[str, int]]:
    """Greedy text and number of tokens for each prompt, first alone, then all at once."""

    def ask(prompt: str) -> tuple[str, int]:
        answer = service.complete(prompt, max_tokens=16)
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
def checkpoint(default_results: Path) -> Path:
    """The default model as a Hugging Face folder, which is how most models come: what the torch
    engine made of it. TensorRT-LLM takes such a folder as it is."""
    [engine] = (default_results / "engines").glob("*/engine.json")
    return engine.parent


def deployment_with(
    directory: Path, version: str, model: Path | None = None, **sections: Any
) -> Deployment:
    """With the stand-in as `version`. `model`: a folder, else the default model is fetched."""
    engine = {
        "backend": "tensorrt_llm",
        "device": "cpu",
        "block_size": 32,  # the only size of 1.0
        **sections.pop("engine", {}),
    }
    deployment = Deployment(directory, engine=engine, **sections)
    if model is not None:
        deployment.config["model"] = {"id": str(model), "name": DEFAULT_MODEL}
    library = install(directory / "library", version)
    deployment.environment = {
        "PYTHONPATH": str(library),
        "PATH": os.pathsep.join([str(library / "bin"), os.environ["PATH"]]),
        "STANDIN_TRTLLM_BOOKS": str(directory / BOOKS),
        "STANDIN_TRTLLM_FAIL": f"slow_fetch@{directory / SLOW_FETCH}",
    }
    return deployment


def idle(state: dict[str, Any]) -> bool:
    return bool(state["instances"]) and all(
        row["active_blocks"] == 0 and row["num_running"] == 0 and row["num_waiting"] == 0
        for row in state["instances"]
    )


def test_agg_serves_an_engine_that_trtllm_build_made_with_the_tokens_of_torch(
    tmp_path: Path, checkpoint: Path, from_torch: list[tuple[str, int]]
) -> None:
    deployment = deployment_with(
        tmp_path,
        "1.0.0",
        checkpoint,
        engine={"flow": "trtllm-build"},
        tensorrt_llm={"examples_dir": str(tmp_path / "library" / "examples")},
    )
    with running(deployment, "serve_agg"):
        assert "smoke test passed" in deployment.snakemake("smoke_test").stdout
        assert answers(deployment) == from_torch
        answer = deployment.complete(PROMPTS[0], max_tokens=4, logprobs=2)["choices"][0]
        assert len(answer["logprobs"]["token_logprobs"]) == 4
        [rank] = (deployment.directory / "results" / "engines").glob("*/trtllm-*/rank0.engine")
        assert rank.exists()


def test_disagg_passes_the_smoke_test_with_the_tokens_of_torch(
    tmp_path: Path, default_results: Path, from_torch: list[tuple[str, int]]
) -> None:
    """From the default model's own file, which is converted first."""
    deployment = deployment_with(tmp_path, "1.2.1")
    share_results(default_results / "models", tmp_path / "results" / "models")
    with running(deployment, "serve_disagg"):
        assert "smoke test passed" in deployment.snakemake("smoke_test").stdout
        assert answers(deployment) == from_torch


def test_agg_router_sends_a_prompt_where_it_is_cached(
    tmp_path: Path, checkpoint: Path, from_torch: list[tuple[str, int]]
) -> None:
    deployment = deployment_with(tmp_path, "1.1.0", checkpoint, workers={"agg": 2})
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
def disagg_router(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("disagg-router")
    # Short prompts, too, go from worker to worker: what is tested is the hand-over.
    sections = {"kv_transfer": {"hold_s": 600.0}, "router": {"local_prefill_tokens": 0}}
    deployment = deployment_with(directory, "1.3.0rc27", checkpoint, **sections)
    with running(deployment, "serve_disagg_router"):
        yield deployment


def test_disagg_router_passes_the_smoke_test_with_the_tokens_of_torch(
    disagg_router: Deployment, from_torch: list[tuple[str, int]]
) -> None:
    assert "smoke test passed" in disagg_router.snakemake("smoke_test").stdout
    assert answers(disagg_router) == from_torch
    state = disagg_router.ready()
    assert sum(row["local_prefill_fallbacks"] for row in state["instances"]) == 0


def test_a_hundred_aborts_in_any_phase_leave_no_block_behind(
    disagg_router: Deployment, from_torch: list[tuple[str, int]]
) -> None:
    """By our load reports, and by the library's own books. Nothing is freed by a time that is over:
    `kv_transfer.hold_s` is longer than this test."""
    disagg_router.wait("idle", idle)
    slow_fetch = disagg_router.directory / SLOW_FETCH
    slow_fetch.write_text(str(SLOW_FETCH_S))
    before = {role: books(disagg_router, role) for role in ("prefill", "decode")}
    counts = asyncio.run(leave_in_the_middle(disagg_router))
    slow_fetch.unlink()
    # The first token comes from the prefill, the second after the fetch.
    phases = collections.Counter(("prefill", "transfer")[n] if n < 2 else "decode" for n in counts)
    assert sum(phases.values()) == NUM_ABORTS
    assert all(phases[phase] >= 10 for phase in ("prefill", "transfer", "decode")), phases

    disagg_router.wait("every block free again", idle, deadline_s=30)
    for role in ("prefill", "decode"):
        found = settled_books(disagg_router, role)
        assert found["trouble"] == ""
        assert found["num_requests"] >= before[role]["num_requests"] + NUM_ABORTS // 2
        left = {name: found[name] for name in ("active_blocks", "requests", "fetches", "contexts")}
        assert not any(left.values()), (role, left)
    # A prefill whose caller has left runs to its end and is fetched; a decode is aborted.
    assert books(disagg_router, "decode")["aborted"]["generation_only"] >= NUM_ABORTS // 4
    assert answers(disagg_router) == from_torch


async def leave_in_the_middle(service: Deployment) -> list[int]:
    """Ask `NUM_ABORTS` times, at most 8 at once, and go away at some moment of some phase; how many
    tokens each had by then. What counts is progress, as time means little on a busy machine."""
    chance, room = random.Random(7), asyncio.Semaphore(8)
    began = time.monotonic()
    service.complete(PROMPTS[0], max_tokens=1)
    prefill_s = time.monotonic() - began

    async def leave(number: int, client: httpx.AsyncClient) -> int:
        body = {
            "model": DEFAULT_MODEL,
            "prompt": f"Story {number}: " + PROMPTS[-1][: chance.randrange(20, 200)],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        num_tokens = 0
        within_s, num_wanted, then_s = chance.choice(
            [
                (chance.uniform(0, prefill_s), 1, 0.0),
                (60.0, 1, chance.uniform(0, SLOW_FETCH_S / 2)),
                (60.0, chance.randrange(2, 9), 0.0),
            ]
        )
        async with room:
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(within_s),
                    client.stream("POST", "/v1/completions", json=body) as response,
                ):
                    assert response.status_code == 200
                    async for line in response.aiter_lines():
                        num_tokens += line.startswith("data: {")
                        if num_tokens >= num_wanted:
                            await asyncio.sleep(then_s)
                            break
        return num_tokens

    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        return await asyncio.gather(*(leave(number, client) for number in range(NUM_ABORTS)))


def books(service: Deployment, role: str) -> dict[str, Any]:
    """What the library of `{role}-0` itself says that it holds, written after now."""
    pid, now = service.pids()[f"worker-{role}-0"], time.time()
    path = service.directory / BOOKS / f"{pid}.json"
    while time.time() < now + 10:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["written"] > now:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} is not kept up to date")


def settled_books(service: Deployment, role: str) -> dict[str, Any]:
    """The same once nothing moves any more: a load report can be a moment ahead of it."""
    deadline = time.monotonic() + 10
    while (found := books(service, role))["active_blocks"] and time.monotonic() < deadline:
        pass
    return found


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


# --- what a person reads when it does not start ------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A model that is built in a second; nothing started."""
    folder = tmp_path_factory.mktemp("tiny")
    deployment = deployment_with(
        folder / "deployment", "1.3.0rc27", save_tiny_model(folder / "model")
    )
    yield deployment
    deployment.stop()


def test_missing_library_is_an_error_of_one_paragraph(tiny: Deployment) -> None:
    whole, tiny.environment = tiny.environment, {}
    done = tiny.snakemake("serve_agg", check=False)
    tiny.environment = whole
    assert done.returncode != 0
    assert last_paragraph(done.stdout) == (
        "TensorRT-LLM is not installed for the Python that would run the workers",
        "set `container.runtime` and run in its image (`snakemake build_image`), or install it "
        "(`pip install tensorrt_llm`), or set `engine.backend: torch`",
    )


def test_worker_out_of_memory_is_an_error_of_one_paragraph(tiny: Deployment) -> None:
    """From inside the library, through the worker's log, to the terminal."""
    tiny.environment["STANDIN_TRTLLM_FAIL"] = "oom"
    done = tiny.snakemake("serve_agg", check=False)
    assert done.returncode != 0
    error, remedy = last_paragraph(done.stdout)
    assert error.startswith("worker-agg-0 could not start: TensorRT-LLM could not be started: ")
    assert "the GPU's memory does not hold the weights, the KV blocks and one batch" in error
    assert "lower `engine.max_batch_size`" in remedy


def test_missing_gpu_is_an_error_before_anything_starts(tiny: Deployment) -> None:
    tiny.config["engine"]["device"] = "cuda"
    tiny.environment["CUDA_VISIBLE_DEVICES"] = ""
    done = tiny.snakemake("serve_agg", check=False)
    tiny.config["engine"]["device"] = "cpu"
    del tiny.environment["CUDA_VISIBLE_DEVICES"]
    assert done.returncode != 0
    error, remedy = last_paragraph(done.stdout)
    assert "TensorRT-LLM runs on NVIDIA GPUs, and there is no GPU to use" in error
    assert "`engine.backend: torch`" in remedy


def last_paragraph(output: str) -> tuple[str, str]:
    """What is wrong, and what to change, as the workflow says it at last."""
    assert "Traceback" not in output
    text, _, remedy = output.rpartition("\n  -> ")
    return text.rpartition("\n\n")[2].strip(), remedy.partition("\n")[0].strip()
