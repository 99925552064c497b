"""Coding agents, unchanged, one for each protocol: each makes a file by a tool and reports.

Agents leave the choice of calling a tool to the model, and the bundled one is too small for that.
A SCRIPTED model answers here, in Hermes' format: it asks for a shell command, and when it has seen
the result it says a last sentence. Everything before it is the real frontend: HTTP, the protocol,
prompts of 25,000 to 50,000 characters and more, the chat template and the parser of tool calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from integration.clients.client_process import run_client
from integration.clients.scripted_service import ANSWER, ScriptedService, call_then_answer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COMMAND = "echo made by a tool > made.txt; cat made.txt"
TASK = "Make the file made.txt"


def program(npm_folder: Path, package: str, inside: str) -> str:
    """The executable of `package` for this machine, which npm installs as a package of its own."""
    found = sorted((npm_folder / "node_modules").glob(f"{package}-linux-*/{inside}"))
    if not found:
        pytest.skip(f"{package} has no program for this machine")
    return str(min(found, key=lambda path: len(path.parts[-2])))


def check_work(
    scripted: ScriptedService, folder: Path, command: Sequence[str], env: dict[str, str]
) -> None:
    """The agent carries the call out, sends the result back and prints the answer."""
    output = run_client(list(command), folder=folder, env=env)
    assert (folder / "made.txt").read_text() == "made by a tool\n"
    assert any("made by a tool" in result for result in scripted.pipeline.tool_results())
    assert ANSWER in output
    assert max(map(len, scripted.pipeline.prompts)) > 20_000


def test_codex_over_responses(npm_folder: Path, scripted: ScriptedService, tmp_path: Path) -> None:
    scripted.pipeline.script = call_then_answer("exec_command", {"cmd": COMMAND})
    folder = tmp_path / "work"
    settings = tmp_path / "codex"
    settings.mkdir()
    (settings / "config.toml").write_text(
        f'model = "{scripted.model}"\nmodel_provider = "served"\n'
        '[model_providers.served]\nname = "served"\nwire_api = "responses"\n'
        f'base_url = "{scripted.url}/v1"\n'
    )
    codex = program(npm_folder, "@openai/codex", "vendor/*/bin/codex")
    options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    command = [codex, "exec", *options, TASK]
    check_work(scripted, folder, command, {"CODEX_HOME": str(settings)})


def test_claude_code_over_messages(
    npm_folder: Path, scripted: ScriptedService, tmp_path: Path
) -> None:
    arguments = {"command": COMMAND, "description": "Make the file"}
    scripted.pipeline.script = call_then_answer("Bash", arguments)
    env = {
        "ANTHROPIC_BASE_URL": scripted.url,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    claude = program(npm_folder, "@anthropic-ai/claude-code", "claude")
    command = [claude, "-p", TASK, "--model", scripted.model, "--allowedTools", "Bash"]
    check_work(scripted, tmp_path / "work", command, env)


def test_opencode_over_chat(npm_folder: Path, scripted: ScriptedService, tmp_path: Path) -> None:
    arguments = {"command": COMMAND, "description": "Make the file"}
    scripted.pipeline.script = call_then_answer("bash", arguments)
    folder = tmp_path / "work"
    folder.mkdir()
    model: dict[str, Any] = {"tool_call": True, "limit": {"context": 1_000_000, "output": 4000}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{scripted.url}/v1", "apiKey": "none"},
        "models": {scripted.model: model},
    }
    (folder / "opencode.json").write_text(json.dumps({"provider": {"served": provider}}))
    env = {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    opencode = program(npm_folder, "opencode", "bin/opencode")
    command = [opencode, "run", "--model", f"served/{scripted.model}", TASK]
    check_work(scripted, folder, command, env)
