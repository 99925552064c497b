"""Requests that OpenAI's specification allows and forbids, and the responses to them.

A SCRIPTED model answers behind the real frontend, so that thousands of requests take minutes.
`SPECIFICATION_EXAMPLES` sets the number of requests for each operation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from integration.clients.client_process import run_client
from integration.clients.environments import from_pypi
from integration.clients.openai_spec import OPERATIONS, SPECIFICATION, write_served_part
from integration.clients.scripted_service import ScriptedService
from integration.deployment import REPO

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

EXAMPLES = int(os.environ.get("SPECIFICATION_EXAMPLES", "25"))
CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance"
ANSWER = 'Hello.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def test_no_failure_and_no_response_against_its_schema(
    scripted: ScriptedService, tmp_path: Path
) -> None:
    if not SPECIFICATION.exists():
        pytest.skip("OpenAI's specification is not here; set OPENAI_SPECIFICATION to its file")
    folder = from_pypi(REPO / "envs" / "schemathesis.txt").wait()
    scripted.pipeline.script = lambda _: ANSWER
    write_served_part(tmp_path / "served.json", scripted.model)
    output = run_client(
        [
            *(str(folder / "bin" / "st"), "run", str(tmp_path / "served.json")),
            *("--url", f"{scripted.url}/v1", "--checks", CHECKS, "--phases", "fuzzing"),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--continue-on-failure"),
            *("--suppress-health-check", "all", "--no-color", "--output-truncate", "false"),
        ],
        folder=tmp_path / "work",
        timeout_s=1200,
    )
    print(output)
    assert f"Tested: {len(OPERATIONS)}" in output
    generated = re.search(r"(\d+) generated, (\d+) passed", output)
    assert generated is not None
    assert generated[1] == generated[2]
    assert int(generated[1]) > 2 * EXAMPLES
