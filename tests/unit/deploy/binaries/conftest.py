"""A machine on which no etcd and no nats-server is installed."""

import platform
from pathlib import Path

import pytest


@pytest.fixture
def only_sh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without etcd and apt. Tests add programs to the folder that this returns."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("ETCD_BIN", raising=False)
    monkeypatch.delenv("NATS_SERVER_BIN", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return folder
