"""The newest Python clients, unchanged, against a deployment of the bundled model.

That model is too small to decide by itself when to call a tool, so most clients require the call
here, and the grammar makes it valid. Clients that have no setting for it meet a scripted model
behind the real frontend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration.clients.client_process import PROGRAMS, address, facts, run_client
from integration.clients.scripted_service import (
    ANSWER,
    ScriptedService,
    call_then_answer,
)
from integration.deployment import DEFAULT_MODEL, Deployment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def run_program(
    name: str, environment: Path, service: Deployment | ScriptedService, folder: Path
) -> dict[str, Any]:
    command = [str(environment / "bin" / "python"), str(PROGRAMS / f"{name}.py")]
    return facts(run_client(command, folder=folder, env=address(service)))


def test_openai_chat(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("openai_chat", client_folder, service, tmp_path)
    assert seen["text"] == seen["streamed"] != ""
    assert len(seen["cities"]) == 2
    assert seen["answer"]
    assert "tool_calls.function.arguments.delta" in seen["kinds"]
    assert seen["parsed"] in ("Paris", "Oslo")
    assert seen["models"] == [DEFAULT_MODEL]


def test_openai_responses(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("openai_responses", client_folder, service, tmp_path)
    assert len(seen["cities"]) == 2
    assert seen["answer"] == seen["retrieved"] != ""
    assert seen["numbers"] == list(range(len(seen["numbers"])))
    assert list(dict.fromkeys(seen["events"])) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert seen["parsed"] in ("Paris", "Oslo")


def test_anthropic_messages(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("anthropic_messages", client_folder, service, tmp_path)
    assert seen["text"]
    assert seen["streamed"]
    assert len(seen["cities"]) == 2
    assert seen["stop_reason"] == "tool_use"
    assert seen["answer"]
    assert {"message_start", "input_json", "content_block_stop", "message_stop"} <= set(
        seen["kinds"]
    )
    assert seen["counted"] == seen["input_tokens"]
    assert seen["models"] == [DEFAULT_MODEL]


def test_langchain(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("langchain_tools", client_folder, service, tmp_path)
    assert len(seen["cities"]) == 1
    assert seen["answer"]
    assert seen["streamed"]
    assert seen["parsed"] in ("Paris", "Oslo")


def test_litellm(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("litellm_tools", client_folder, service, tmp_path)
    assert len(seen["cities"]) == 1
    assert seen["answer"]
    assert seen["streamed"]
    assert seen["too_long"] == "ContextWindowExceededError"


def test_pydantic_ai_output_tool(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    seen = run_program("pydantic_ai_output", client_folder, service, tmp_path)
    assert seen["parsed"] in ("Paris", "Oslo")


def test_pydantic_ai_agent_calls_a_tool(
    scripted: ScriptedService, client_folder: Path, tmp_path: Path
) -> None:
    """A scripted model: the agent leaves the choice of calling to the model."""
    scripted.pipeline.script = call_then_answer("get_weather", {"city": "Oslo"})
    seen = run_program("pydantic_ai_tool", client_folder, scripted, tmp_path)
    assert seen == {"cities": ["Oslo"], "answer": ANSWER}
    assert any("18 degrees" in result for result in scripted.pipeline.tool_results())


def test_instructor(service: Deployment, instructor_folder: Path, tmp_path: Path) -> None:
    seen = run_program("instructor_default", instructor_folder, service, tmp_path)
    assert seen["mode"] == "Mode.TOOLS"
    assert len(seen["cities"]) == 1


def llm(*args: str, environment: Path, service: Deployment | ScriptedService, folder: Path) -> str:
    """Run the program `llm`, with the service as one of its models."""
    where = address(service)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: {where['SERVICE_MODEL']}\n"
        f"  api_base: {where['SERVICE_URL']}/v1\n  supports_tools: true\n  supports_schema: true\n"
    )
    env = {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
    return run_client([str(environment / "bin" / "llm"), *args], folder=folder, env=env).strip()


def test_llm(service: Deployment, client_folder: Path, tmp_path: Path) -> None:
    def ask(*args: str) -> str:
        command = ["prompt", "-m", "served", "-o", "temperature", "0", *args]
        return llm(*command, environment=client_folder, service=service, folder=tmp_path)

    short = ("-o", "max_tokens", "16", "Name a colour.")
    assert ask(*short) == ask("--no-stream", *short) != ""


def test_llm_calls_a_tool(scripted: ScriptedService, client_folder: Path, tmp_path: Path) -> None:
    """A scripted model: the program leaves the choice of calling to the model."""
    scripted.pipeline.script = call_then_answer("double", {"number": 21})
    answer = llm(
        *("prompt", "-m", "served", "What is twice 21?"),
        *("--functions", "def double(number: int) -> int:\n    return 2 * number\n"),
        environment=client_folder,
        service=scripted,
        folder=tmp_path,
    )
    assert answer.endswith(ANSWER)
    assert any(result.startswith("42") for result in scripted.pipeline.tool_results())
