"""Which interfaces UCX may listen on."""

import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from serving.kv_transfer.transports.ucx.options import own_hosts, ucx_options


def address(text: str) -> SimpleNamespace:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return SimpleNamespace(family=family, address=text)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [address("10.1.2.3")]})


def test_only_the_interface_of_the_address(tmp_path: Path) -> None:
    assert ucx_options("10.1.2.3", infiniband=tmp_path)["NET_DEVICES"] == "eth0"
    unknown = ucx_options("10.9.9.9", infiniband=tmp_path)
    assert "NET_DEVICES" not in unknown  # no interface here has that address


def test_rails_of_infiniband_are_left_to_ucx(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    assert "NET_DEVICES" not in ucx_options("10.1.2.3", infiniband=tmp_path)


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "eth5")
    assert "NET_DEVICES" not in ucx_options("10.1.2.3", infiniband=tmp_path)


def test_own_hosts_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {
        "lo": [address("127.0.0.1"), address("::1")],
        "eth0": [address("10.1.2.3"), address("10.1.2.4"), address("fe80::1")],
        "eth1": [address("10.9.9.9")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert own_hosts("eth0") == ["10.1.2.3", "10.1.2.4"]
    assert own_hosts("lo") == ["127.0.0.1"]
    assert own_hosts(None) == ["127.0.0.1", "10.1.2.3", "10.1.2.4", "10.9.9.9"]
    assert own_hosts("gone") == []
