"""What a person may write for an address, and what is listened on then."""

import socket
from types import SimpleNamespace

import psutil
import pytest
from serving.config import parse
from serving.deploy.cluster.addresses import with_head_addresses
from serving.deploy.cluster.network import listen_address, with_listen_addresses
from serving.errors import ConfigError


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(family: int, address: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=address)

    found = {
        "lo": [entry(socket.AF_INET, "127.0.0.1"), entry(socket.AF_INET6, "::1")],
        "eth0": [
            entry(socket.AF_INET6, "fe80::1%eth0"),
            entry(socket.AF_INET6, "fd00::7"),
            entry(socket.AF_INET, "10.1.2.3"),
        ],
        "ib0": [entry(psutil.AF_LINK, "00:00"), entry(socket.AF_INET, "192.168.9.4")],
        "down0": [entry(psutil.AF_LINK, "00:01")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(
    ("wanted", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("0.0.0.0", "0.0.0.0"),
        ("172.16.0.1", "172.16.0.1"),
        ("eth0", "10.1.2.3"),
        ("ib0", "192.168.9.4"),
        ("10.0.0.0/8", "10.1.2.3"),
        ("192.168.9.77/24", "192.168.9.4"),
        ("fd00::/8", "fd00::7"),
    ],
)
def test_address_network_and_interface(wanted: str, address: str) -> None:
    assert listen_address(wanted, "frontend.host") == address


@pytest.mark.parametrize("wanted", ["eth7", "down0", "172.16.0.0/12", ""])
def test_what_is_not_here_is_refused_with_what_is(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"frontend\.host") as caught:
        listen_address(wanted, "frontend.host")
    assert "eth0 (fd00::7 10.1.2.3)" in caught.value.remedy


def test_every_plane_is_resolved_by_itself() -> None:
    raw = {
        "frontend": {"host": "0.0.0.0"},
        "nats": {"host": "ib0"},
        "network": {"rpc_host": "eth0", "kv_host": "192.168.0.0/16"},
    }
    config = with_listen_addresses(parse(raw))
    hosts = (config.frontend.host, config.nats.host, config.etcd.host)
    assert hosts == ("0.0.0.0", "192.168.9.4", "127.0.0.1")
    assert (config.network.rpc_host, config.network.kv_host) == ("10.1.2.3", "192.168.9.4")
    assert with_listen_addresses(config) == config
    assert with_listen_addresses(parse({})) == parse({})


@pytest.mark.parametrize("key", ["rpc_host", "kv_host"])
@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_workers_need_an_address_that_others_can_use(key: str, wildcard: str) -> None:
    with pytest.raises(ConfigError, match="other machines cannot connect"):
        with_listen_addresses(parse({"network": {key: wildcard}}))


def test_address_of_a_cluster_is_one_that_others_can_use() -> None:
    config = parse({"cluster": {"address": "192.168.0.0/16"}})
    assert with_head_addresses(config).etcd.host == "192.168.9.4"
    with pytest.raises(ConfigError, match=r"cluster\.address.*other machines cannot connect"):
        with_head_addresses(parse({"cluster": {"address": "0.0.0.0"}}))
