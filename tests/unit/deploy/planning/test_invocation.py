"""What the command line asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.deploy.planning.invocation import read_command_line
from serving.errors import OperatorError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from any profile."""
    monkeypatch.chdir(tmp_path)


def test_target_names_a_topology_anywhere_on_the_command_line() -> None:
    for argv in (["serve_disagg_router", "--cores", "2"], ["--cores", "2", "serve_disagg_router"]):
        request = read_command_line(argv)
        assert request.topology == "disagg_router"
        assert request.serves
        assert request.executes


def test_values_of_options_are_not_targets() -> None:
    request = read_command_line(["status", "--forcerun", "serve_agg", "--cores", "1"])
    assert request.targets == ("status",)
    assert request.topology is None


def test_no_target_means_the_whole_service() -> None:
    assert read_command_line(["--cores", "1"]).serves
    assert read_command_line(["run/worker-decode-1.up", "--cores", "1"]).serves


@pytest.mark.parametrize("target", ["status", "stop", "doctor", "smoke_test", "check_host"])
def test_other_targets_do_not_serve(target: str) -> None:
    assert not read_command_line([target, "--cores", "1"]).serves


@pytest.mark.parametrize(
    "flags",
    [
        *(["-n"], ["--dry-run"], ["--lint"], ["--dag"], ["--rulegraph"], ["--list-rules"]),
        *(["--summary"], ["--touch"], ["--unlock"], ["--cleanup-metadata", "run/etcd.up"]),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_only_inspect_execute_nothing(flags: list[str]) -> None:
    assert not read_command_line(["serve_agg", "--cores", "1", *flags]).executes


def test_two_topologies_are_refused() -> None:
    with pytest.raises(OperatorError, match="serve_agg and serve_disagg cannot be served"):
        read_command_line(["serve_disagg", "serve_agg", "--cores", "1"])


@pytest.mark.parametrize("other", ["serve", "serve_disagg", "join", "bench", "run/etcd.up"])
def test_stop_excludes_targets_that_need_what_it_stops(other: str) -> None:
    with pytest.raises(OperatorError, match=r"`stop` and `.*` cannot be done in one run"):
        read_command_line(["stop", other, "--cores", "1"])
    assert read_command_line(["stop", "status", "--cores", "1"]).executes
