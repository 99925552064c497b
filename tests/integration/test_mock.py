"""A deployment of mock workers: the same rules, services and checks, and no model."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.deployment import Deployment, running
from integration.tiny_model import save_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def test_mock_workers_serve_and_pass_the_smoke_test(tmp_path: Path) -> None:
    """Two processes of each role, with two instances in each."""
    model = save_tiny_model(tmp_path / "tiny")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    deployment = Deployment(
        tmp_path / "mock",
        str(model),
        engine={"backend": "mock"},
        workers={"prefill": 2, "decode": 2, "instances_per_process": 2},
        mock={"prefill_tokens_per_s": 100000, "step_s": 0.001, "transfer_bytes_per_s": 1e8},
    )
    with running(deployment, "serve_disagg_router"):
        rows = deployment.wait("8 instances", lambda state: len(state["instances"]) == 8)
        names = {row["instance_id"] for row in rows["instances"]}
        assert {"prefill-0", "prefill-0-1", "decode-1", "decode-1-1"} <= names
        assert len({row["epoch"] for row in rows["instances"]}) == 8
        smoke = deployment.snakemake("smoke_test")
        assert "over mock" in smoke.stdout
        first, second = (deployment.complete("One two three.") for _ in range(2))
        assert first["choices"] == second["choices"]
        assert first["choices"][0]["text"].isprintable()
        status = deployment.snakemake("status")
        assert "not routed to" not in status.stdout
