"""Addresses of heads and nodes, and the programs that each of them runs."""

from __future__ import annotations

import pytest
from serving.config import Config, parse
from serving.config.resolve import worker_counts
from serving.deploy.cluster.addresses import (
    head_address,
    with_control_services_of_head,
    with_head_addresses,
    with_node_addresses,
)
from serving.deploy.cluster.agreement import merge
from serving.errors import ConfigError, OperatorError
from unit.deploy.cluster.head_fixture import head_config, programs_of, record
from unit.deploy.resolved import plan_for_test


def test_head_without_an_address_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEAD_NODE_IP", raising=False)
    with pytest.raises(ConfigError, match=r"lo \(127\.0\.0\.1") as caught:
        with_head_addresses(Config())
    assert caught.value.key == "cluster.address"
    monkeypatch.setenv("HEAD_NODE_IP", "10.0.0.1")
    assert with_head_addresses(Config()).cluster.address == "10.0.0.1"
    monkeypatch.setenv("HEAD_NODE_IP", "127.0.0.1")
    with pytest.raises(ConfigError, match="only this machine"):
        with_head_addresses(Config())


def test_etcd_and_nats_follow_the_address_of_the_head_unless_they_were_moved() -> None:
    raw = {"cluster": {"address": "10.0.0.7"}, "network": {"kv_host": "10.1.0.7"}}
    config = with_head_addresses(parse(raw))
    assert (config.etcd.host, config.nats.host, config.network.rpc_host) == ("10.0.0.7",) * 3
    assert config.network.kv_host == "10.1.0.7"
    assert config.frontend.host == "127.0.0.1", "the API stays where it is"
    assert config.cluster.node == "10-0-0-7"


@pytest.mark.parametrize(
    ("own", "environment", "expected"),
    [
        ("127.0.0.1", {}, ("127.0.0.1", 2379)),
        ("127.0.0.1:99", {}, ("127.0.0.1", 99)),
        (None, {"ETCD_ENDPOINTS": "https://127.0.0.2:98,x:1"}, ("127.0.0.2", 98)),
        (None, {"ETCD_ENDPOINTS": "127.0.0.2:97"}, ("127.0.0.2", 97)),
        (None, {"HEAD_NODE_IP": "127.0.0.3"}, ("127.0.0.3", 2379)),
        ("127.0.0.1", {"HEAD_NODE_IP": "127.0.0.3"}, ("127.0.0.1", 2379)),
    ],
)
def test_head_is_named_by_config_or_environment(
    own: str | None,
    environment: dict[str, str],
    expected: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ETCD_ENDPOINTS", "HEAD_NODE_IP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert head_address(parse({"cluster": {"head": own}})) == expected


def test_a_missing_or_unknown_head_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ETCD_ENDPOINTS", "HEAD_NODE_IP"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="which head to join"):
        head_address(Config())
    with pytest.raises(ConfigError, match="not an IPv4 address or the name"):
        head_address(parse({"cluster": {"head": "nowhere.invalid"}}))


@pytest.mark.parametrize("server", ["nats://10.0.0.9:4333", "10.0.0.9:4333"])
def test_nats_may_be_reached_elsewhere(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", server)
    config = with_control_services_of_head(head_config(), "10.0.0.1", 2379)
    assert (config.nats.host, config.nats.port) == ("10.0.0.9", 4333)
    assert config.etcd.host == "10.0.0.1"
    monkeypatch.setenv("NATS_SERVER", "somewhere")
    with pytest.raises(OperatorError, match="NATS_SERVER"):
        with_control_services_of_head(head_config(), "10.0.0.1", 2379)


def test_head_runs_etcd_nats_and_its_own_workers() -> None:
    config = head_config()
    assert programs_of(config) == ["etcd", "nats", "worker-decode-10-0-0-1-0", "frontend"]
    alone = head_config(cluster={"address": "10.0.0.1", "head_roles": []})
    assert programs_of(alone) == ["etcd", "nats", "frontend"]


def test_node_runs_its_workers_alone() -> None:
    head = head_config()
    raw = {"workers": {"prefill": 2}, "cluster": {"head": "10.0.0.1"}}
    config = with_node_addresses(
        merge(raw, parse(raw), head, record(head)), "10.0.0.2", "10.0.0.1", 2379
    )
    assert worker_counts(config) == {"prefill": 2}
    assert programs_of(config) == ["worker-prefill-10-0-0-2-0", "worker-prefill-10-0-0-2-1"]


def test_etcd_off_loopback_asks_for_certificates_and_keeps_its_peers_port_to_itself() -> None:
    config = head_config(cluster={"address": "10.0.0.1"})
    etcd = plan_for_test(config)["etcd"]
    command = " ".join(etcd.command)
    assert "--client-cert-auth" in command
    assert "--listen-client-urls=https://10.0.0.1:2379" in command
    assert "--listen-peer-urls=http://127.0.0.1:2380" in command
