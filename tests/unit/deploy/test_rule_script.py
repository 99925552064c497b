"""How a rule script reports, and how it ends."""

from pathlib import Path

import pytest
from serving.deploy.rule_script import reporting
from serving.errors import OperatorError


def test_operator_error_ends_a_rule_script_with_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "check.log"

    def script() -> None:
        with reporting(log) as report:
            report("looking")
            raise OperatorError("no room", remedy="make some")

    with pytest.raises(SystemExit) as caught:
        script()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "looking\n"
    assert printed.err == "\nno room\n  -> make some\n\n"
    assert log.read_text() == "looking\nno room\n  -> make some\n"


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), reporting(tmp_path / "log"):
        raise ZeroDivisionError
