"""Runs one client as a process of its own, against a service."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.clients.scripted_service import ScriptedService
from integration.deployment import DEFAULT_MODEL, Deployment

PROGRAMS = Path(__file__).parent / "programs"
CLIENT_S = 120


def run_client(
    command: list[str],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = CLIENT_S,
) -> str:
    """What a client prints. It runs in `folder`, which is its home too, and sees no setting of
    this person's: no keys, no configuration of a client that is installed here."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LITELLM_LOCAL_MODEL_COST_MAP": "true",  # else it looks for a newer one on the net
            **(env or {}),
        },
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def facts(output: str) -> dict[str, Any]:
    """What a program of `programs/` reports in its last line."""
    reported: dict[str, Any] = json.loads(output.splitlines()[-1])
    return reported


def address(service: Deployment | ScriptedService) -> dict[str, str]:
    """Where the programs find a service."""
    model = service.model if isinstance(service, ScriptedService) else DEFAULT_MODEL
    return {"SERVICE_URL": service.url, "SERVICE_MODEL": model}
