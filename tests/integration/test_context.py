"""The default deployment, with nothing configured but ports: what context it offers, and in how much memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import psutil
import pytest
from integration.deployment import Deployment, running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
NUM_TOKENS = 3000


def greedy_by_transformers(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def embedding_by_transformers(folder: Path, prompt: list[int]) -> list[float]:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        state = model(torch.tensor([prompt])).last_hidden_state[0, -1]
    vector: list[float] = (state / state.norm()).tolist()
    return vector


def test_default_deployment_serves_a_prompt_of_3000_tokens(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "here")
    del deployment.config["engine"]
    with running(deployment, "serve_disagg_router"):
        sizes = {
            name: psutil.Process(pid).memory_info().rss
            for name, pid in deployment.pids().items()
            if name.startswith("worker-")
        }
        assert len(sizes) == 2
        assert max(sizes.values()) < 2 * 10**9, sizes

        (model,) = httpx.get(f"{deployment.url}/v1/models").json()["data"]
        assert model["max_model_len"] == 8192
        assert deployment.ready()["max_model_len"] == 8192
        assert "8192 tokens" in deployment.snakemake("status").stdout

        prompt = random.Random(6).choices(range(100, 40_000), k=NUM_TOKENS)
        answer = deployment.complete(prompt, max_tokens=4, return_token_ids=True, ignore_eos=True)
        assert answer["usage"]["prompt_tokens"] == NUM_TOKENS
        tokens = answer["choices"][0]["token_ids"]

        body = {"model": model["id"], "input": prompt[:600]}
        embedded = httpx.post(f"{deployment.url}/v1/embeddings", json=body, timeout=120)
        assert embedded.status_code == 200, embedded.text
        vector = embedded.json()["data"][0]["embedding"]

        too_long = {"model": model["id"], "prompt": [100] * 9000, "max_tokens": 8}
        refusal = httpx.post(f"{deployment.url}/v1/completions", json=too_long)
        assert refusal.status_code == 400
        message = refusal.json()["error"]["message"]
        assert "maximum context length is 8192" in message
        assert "engine.max_model_len" in message
    (built,) = (deployment.directory / "results" / "engines").glob("*/engine.json")
    assert json.loads(built.read_text())["model_max_len"] == 8192
    expected = greedy_by_transformers(built.parent, prompt, 4)
    assert tokens[: len(expected)] == expected
    assert vector == pytest.approx(embedding_by_transformers(built.parent, prompt[:600]), abs=1e-4)
