"""How a rule script ends, and what it prints and logs."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving.config import Config
from serving.deploy.rule_script import rule_script, script_config
from serving.errors import OperatorError
from unit.deploy.resolved import resolve_for_test


def fake_snakemake(folder: Path) -> Any:
    """What Snakemake gives a script, as far as `rule_script` reads it."""
    config = script_config(resolve_for_test(Config()), folder / "failures")
    return SimpleNamespace(config=config, log=[str(folder / "logs" / "rule.log")])


def fail(snakemake: Any) -> None:
    with rule_script(snakemake) as (_, report):
        report("looking")
        raise OperatorError("no room", remedy="make some")


def test_script_gets_the_resolved_configuration(tmp_path: Path) -> None:
    with rule_script(fake_snakemake(tmp_path)) as (config, _):
        assert config == resolve_for_test(Config())


def test_operator_error_ends_a_script_with_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        fail(fake_snakemake(tmp_path))
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "looking\n"
    assert printed.err == "\nno room\n  -> make some\n\n"
    assert (tmp_path / "logs" / "rule.log").read_text() == "looking\nno room\n  -> make some\n"


def test_failures_of_several_scripts_are_kept_for_the_end_of_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            fail(fake_snakemake(tmp_path))
    assert (tmp_path / "failures").read_text().count("no room\n  -> make some\0") == 2


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), rule_script(fake_snakemake(tmp_path)):
        raise ZeroDivisionError


def test_colours_of_the_terminal_stay_out_of_the_log(tmp_path: Path) -> None:
    with rule_script(fake_snakemake(tmp_path)) as (_, report):
        report("\x1b[32mok\x1b[0m  fine")
    assert (tmp_path / "logs" / "rule.log").read_text() == "ok  fine\n"


def test_full_disk_ends_a_script_with_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "results/models/x")
    with pytest.raises(SystemExit) as caught, rule_script(fake_snakemake(tmp_path)):
        raise full
    assert caught.value.code == 1
    assert "\nthe disk is full at results/models/x\n  -> free some" in capsys.readouterr().err


def test_disk_without_room_for_the_log_costs_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snakemake = fake_snakemake(tmp_path)
    snakemake.log[0] = "/dev/full"
    snakemake.config["failures_file"] = "/dev/full"
    with pytest.raises(SystemExit) as caught:
        fail(snakemake)
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "looking\n"
    assert "no room" in printed.err


def test_interrupt_ends_a_script_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, rule_script(fake_snakemake(tmp_path)):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err
