"""How a check ends, and what it leaves behind."""

from pathlib import Path

import msgspec
import pytest
from serving.deploy.checks.findings import CheckResult, Finding, conclude, judge, render
from serving.errors import OperatorError


def test_warning_does_not_fail_a_check_but_a_blocking_finding_does() -> None:
    warning = Finding("a", False, "low", "raise it", warning=True)
    assert judge("check", [warning]).ok
    assert not judge("check", [warning, Finding("b", False, "gone")]).ok


def test_a_failing_check_still_writes_its_result_and_reports_warnings(tmp_path: Path) -> None:
    path, said = tmp_path / "checks" / "host.json", []
    findings = [
        Finding("disk", False, "1 GB free", "free some"),
        Finding("cores", False, "1 core", "get more", warning=True),
    ]
    with pytest.raises(OperatorError) as caught:
        conclude(judge("check_host", findings), path, report=said.append)
    assert caught.value.what == "check_host failed: disk: 1 GB free"
    assert caught.value.remedy == "free some"
    assert said == [f"check_host: {render(findings[1])}"]
    assert msgspec.json.decode(path.read_bytes(), type=CheckResult).checks == findings
