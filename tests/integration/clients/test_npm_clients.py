"""The newest clients from npm, unchanged, against a deployment of the bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.clients.client_process import PROGRAMS, address, facts, run_client
from integration.deployment import Deployment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.mark.parametrize("provider", ["compatible", "openai"])
def test_vercel_ai_sdk(
    npm_folder: Path, service: Deployment, tmp_path: Path, provider: str
) -> None:
    """`@ai-sdk/openai-compatible` speaks chat completions, `@ai-sdk/openai` responses."""
    env = {**address(service), "CLIENTS_FOLDER": str(npm_folder)}
    command = ["node", str(PROGRAMS / "ai_sdk.mjs"), provider]
    seen = facts(run_client(command, folder=tmp_path, env=env))
    assert len(seen["cities"]) == 2
    assert seen["steps"] == 2
    assert seen["answer"]
    assert seen["streamed"]
    assert seen["parsed"] in ("Paris", "Oslo")


def test_openai_node(npm_folder: Path, service: Deployment, tmp_path: Path) -> None:
    env = {**address(service), "CLIENTS_FOLDER": str(npm_folder)}
    seen = facts(run_client(["node", str(PROGRAMS / "openai_node.mjs")], folder=tmp_path, env=env))
    assert len(seen["cities"]) == 1
    assert seen["answer"]
    assert seen["responses"]
