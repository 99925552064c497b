"""What a node takes over from its head, what it keeps, and when it is refused."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Any

import pytest
from serving.config import MULTINODE, Config, FrontendConfig, as_plain, nest, parse
from serving.config.resolve import with_topology, worker_counts
from serving.deploy.cluster import membership as cluster
from serving.deploy.cluster.membership import Cluster
from serving.deploy.processes import certificates, credentials
from serving.discovery.etcd import read_join_file
from serving.errors import ConfigError, OperatorError
from serving.protocol import InstanceInfo, ModelCard
from unit.deploy.resolved import plan_for_test

HEAD = {
    "model": {"id": "org/model", "source": "hub", "revision": "main"},
    "engine": {"block_size": 32, "num_threads": 8, "max_model_len": 4096},
    "cluster": {"address": "10.0.0.1"},
}


def head_config(**more: Any) -> Config:
    config = with_topology(parse(HEAD | more), MULTINODE)
    return cluster.with_head_addresses(config)


def told(config: Config, **more: Any) -> Cluster:
    facts = {
        "code": cluster._code(),
        "config": as_plain(config),
        "dtype": "float32",
        "commit": "abc123",
        "hash_salt": "salt",
        "nats_token": "t",
        "rpc_secret": "s",
    }
    return Cluster(**(facts | more))


def merged(raw: dict[str, Any]) -> Config:
    head = head_config()
    return cluster._merged(nest(raw), parse(raw), head, told(head))


def test_head_without_an_address_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEAD_NODE_IP", raising=False)
    with pytest.raises(ConfigError, match=r"lo \(127\.0\.0\.1") as caught:
        cluster.with_head_addresses(Config())
    assert caught.value.key == "cluster.address"
    monkeypatch.setenv("HEAD_NODE_IP", "10.0.0.1")
    assert cluster.with_head_addresses(Config()).cluster.address == "10.0.0.1"
    monkeypatch.setenv("HEAD_NODE_IP", "127.0.0.1")
    with pytest.raises(ConfigError, match="only this machine"):
        cluster.with_head_addresses(Config())


def test_planes_follow_the_address_of_the_head_unless_they_were_moved() -> None:
    raw = {"cluster": {"address": "10.0.0.7"}, "network": {"kv_host": "10.1.0.7"}}
    config = cluster.with_head_addresses(parse(raw))
    assert (config.etcd.host, config.nats.host, config.network.rpc_host) == ("10.0.0.7",) * 3
    assert config.network.kv_host == "10.1.0.7"
    assert config.frontend.host == "127.0.0.1", "the API stays where it is"
    assert config.cluster.node == "10-0-0-7"


def test_node_takes_the_heads_settings_and_keeps_its_own() -> None:
    config = merged(
        {
            "engine": {"num_threads": 2, "block_size": 16},
            "workers": {"prefill": 3},
            "cluster": {"role": "decode", "node": "n2"},
            "container": {"runtime": "podman"},
        }
    )
    assert (config.engine.block_size, config.engine.max_model_len) == (32, 4096)
    assert (config.engine.num_threads, config.workers.prefill) == (2, 3)
    assert (config.cluster.role, config.cluster.node) == ("decode", "n2")
    assert config.container.runtime == "podman"
    assert config.model.revision == "abc123", "the commit that `main` meant at the head"
    assert config.network.rpc_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        ({"engine": {"block_size": 64}}, ["engine.block_size: 64 here, 32 at the head"]),
        ({"engine": {"block_size": 16}}, []),  # the default: nothing was asked for
        ({"engine": {"num_threads": 1}}, []),
        ({"model": {"id": "org/other"}}, ["model.id: 'org/other' here, 'org/model' at the head"]),
        ({"model": {"revision": "abc123"}}, []),
        ({"model": {"revision": "old"}}, ["model.revision: 'old' here, 'abc123' at the head"]),
        ({"frontend": {"port": 9999}}, []),
    ],
)
def test_only_what_was_asked_for_and_differs_is_refused(raw: Any, lines: list[str]) -> None:
    head = head_config()
    assert cluster._config_differences(nest(raw), parse(raw), head, told(head)) == lines


def test_other_code_is_a_difference() -> None:
    [line] = cluster._code_difference(told(head_config(), code="0.0.1 (0123)"))
    assert line.endswith("0.0.1 (0123) at the head")
    assert cluster._code_difference(told(head_config())) == []


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
    assert cluster._head(parse({"cluster": {"head": own}})) == expected


def test_nobody_to_join_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ETCD_ENDPOINTS", "HEAD_NODE_IP"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="which head"):
        cluster._head(Config())
    with pytest.raises(ConfigError, match="no IPv4 address or name"):
        cluster._head(parse({"cluster": {"head": "nowhere.invalid"}}))


@pytest.mark.parametrize("server", ["nats://10.0.0.9:4333", "10.0.0.9:4333"])
def test_nats_may_be_reached_elsewhere(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", server)
    config = cluster._with_planes_of_head(head_config(), "10.0.0.1", 2379)
    assert (config.nats.host, config.nats.port) == ("10.0.0.9", 4333)
    assert config.etcd.host == "10.0.0.1"
    monkeypatch.setenv("NATS_SERVER", "somewhere")
    with pytest.raises(OperatorError, match="NATS_SERVER"):
        cluster._with_planes_of_head(head_config(), "10.0.0.1", 2379)


def registered(instance_id: str, address: str) -> InstanceInfo:
    card = ModelCard("m", "", 512, 16, "salt", "f", 0)
    addresses = ["unix:run/w.sock", f"tcp://{address}:4000"]
    return InstanceInfo(instance_id, 1, "prefill", addresses, "", card, 8, 8, 1, "h")


def test_two_machines_cannot_have_one_name() -> None:
    config = merged({"cluster": {"node": "n2"}})
    cluster._require_own_name(config, [registered("prefill-n2-0", "10.0.0.2")], "10.0.0.2")
    cluster._require_own_name(config, [registered("prefill-n20-0", "10.0.0.3")], "10.0.0.2")
    with pytest.raises(ConfigError, match=r"registered already, from tcp://10\.0\.0\.3:4000"):
        cluster._require_own_name(config, [registered("prefill-n2-0", "10.0.0.3")], "10.0.0.2")


def test_join_file_is_asked_for_and_looked_at(tmp_path: Path) -> None:
    config = parse({"cluster": {"join_file": str(tmp_path / "join.pem")}})
    with pytest.raises(ConfigError, match="No such file") as caught:
        cluster._join_file(config)
    assert "scp HEAD:" in caught.value.remedy
    (tmp_path / "join.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match="is no join file"):
        cluster._join_file(config)
    (tmp_path / "join.pem").write_text(certificates.make().join)
    assert cluster._join_file(config) == tmp_path / "join.pem"


def programs_of(config: Config) -> list[str]:
    return list(plan_for_test(config).fingerprints)


def test_head_runs_planes_and_its_own_workers() -> None:
    config = head_config()
    assert programs_of(config) == ["etcd", "nats", "worker-decode-10-0-0-1-0", "frontend"]
    alone = head_config(cluster={"address": "10.0.0.1", "head_roles": []})
    assert programs_of(alone) == ["etcd", "nats", "frontend"]


def test_node_runs_its_workers_alone() -> None:
    head = head_config()
    raw = {"workers": {"prefill": 2}, "cluster": {"head": "10.0.0.1"}}
    config = cluster._at(cluster._merged(raw, parse(raw), head, told(head)), "10.0.0.2", "10.0.0.1")
    assert worker_counts(config) == {"prefill": 2}
    assert programs_of(config) == ["worker-prefill-10-0-0-2-0", "worker-prefill-10-0-0-2-1"]


def test_etcd_off_loopback_asks_for_certificates_and_keeps_its_peers_port_to_itself() -> None:
    config = head_config(cluster={"address": "10.0.0.1"})
    etcd = plan_for_test(config)["etcd"]
    command = " ".join(etcd.command)
    assert "--client-cert-auth" in command
    assert "--listen-client-urls=https://10.0.0.1:2379" in command
    assert "--listen-peer-urls=http://127.0.0.1:2380" in command


def test_certificates_fit_each_other_and_nobody_elses(tmp_path: Path) -> None:
    made, other = certificates.make(), certificates.make()
    for name, text in (("join", made.join), ("server", made.server), ("other", other.join)):
        (tmp_path / f"{name}.pem").write_text(text)
    certificate, key, authority = read_join_file(str(tmp_path / "join.pem"))
    assert certificate.count(b"BEGIN CERTIFICATE") == authority.count(b"BEGIN CERTIFICATE") == 1
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert made.authority.encode() in authority

    def handshake(client_file: str) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / "server.pem")
        server.load_verify_locations(cadata=made.authority)
        server.verify_mode = ssl.CERT_REQUIRED
        client = certificates.client_context(str(tmp_path / client_file))
        pipes = [ssl.MemoryBIO() for _ in range(4)]
        ends = [
            server.wrap_bio(pipes[0], pipes[1], server_side=True),
            client.wrap_bio(pipes[2], pipes[3]),
        ]
        for _ in range(6):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                pipes[2].write(pipes[1].read())
                pipes[0].write(pipes[3].read())
        assert ends[0].getpeercert()

    handshake("join.pem")
    with pytest.raises(ssl.SSLError):
        handshake("other.pem")


def test_certificates_are_made_once_and_only_for_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    credentials.ensure_named(f"--cert-file={credentials.ETCD_SERVER_FILE}")
    first = Path(credentials.JOIN_FILE).read_text()
    credentials.ensure_named(f"--cert-file={credentials.ETCD_SERVER_FILE}")
    assert Path(credentials.JOIN_FILE).read_text() == first
    assert {path.stat().st_mode & 0o777 for path in Path("run/secrets").iterdir()} == {0o600}


def test_api_gets_a_certificate_for_where_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    frontend = credentials.with_certificate(FrontendConfig(tls=True))
    settings = f"{frontend.tls_cert_file} {frontend.tls_key_file}"
    credentials.ensure_named(settings, "10.0.0.1")
    first = Path(credentials.API_CERTIFICATE_FILE).read_text()
    assert certificates.names(first, "10.0.0.1")
    assert certificates.names(first, "localhost")
    assert not certificates.names(first, "10.0.0.2")
    credentials.ensure_named(settings, "10.0.0.1")
    assert Path(credentials.API_CERTIFICATE_FILE).read_text() == first
    credentials.ensure_named(settings, "10.0.0.2")
    assert certificates.names(Path(credentials.API_CERTIFICATE_FILE).read_text(), "10.0.0.2")
    assert credentials.trust(frontend) is not None
    assert credentials.trust(FrontendConfig()) is None


def test_own_certificate_means_https_and_needs_its_key() -> None:
    given = {"tls_cert_file": "a.pem", "tls_key_file": "k.pem"}
    frontend = credentials.with_certificate(parse({"frontend": given}).frontend)
    assert frontend.tls
    assert credentials.scheme(frontend) == "https"
    with pytest.raises(ConfigError, match=r"frontend\.tls_key_file"):
        parse({"frontend": {"tls_cert_file": "a.pem"}})
