"""Which interfaces UCX may listen on."""

import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from serving.kv_transfer import ucx


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    address = SimpleNamespace(family=socket.AF_INET, address="10.1.2.3")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [address]})


def without_infiniband(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(ucx, "INFINIBAND", folder)


def test_only_the_interface_of_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_infiniband(monkeypatch, tmp_path)
    assert ucx.ucx_options("10.1.2.3")["NET_DEVICES"] == "eth0"
    assert "NET_DEVICES" not in ucx.ucx_options("10.9.9.9")  # nobody here has that address


def test_rails_of_infiniband_are_left_to_ucx(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    without_infiniband(monkeypatch, tmp_path)
    assert "NET_DEVICES" not in ucx.ucx_options("10.1.2.3")


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_infiniband(monkeypatch, tmp_path)
    monkeypatch.setenv("UCX_NET_DEVICES", "eth5")
    assert "NET_DEVICES" not in ucx.ucx_options("10.1.2.3")
