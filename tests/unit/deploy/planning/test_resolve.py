"""From what a person wrote to what it means: the stages of `resolve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.config import ResolvedConfig, as_plain
from serving.config.resolve import read_resolved
from serving.deploy.cluster.joined import write_joined
from serving.deploy.planning.invocation import Invocation
from serving.deploy.planning.resolve import resolve
from serving.deploy.processes.topology_record import TopologyRecord
from serving.deploy.security.secret_files import API_CERTIFICATE_FILE, API_KEYS_FILE

SERVE_AGG = Invocation(targets=("serve_agg",), topology="agg", executes=True)
STATUS = Invocation(targets=("status",), executes=True)
RECORD = TopologyRecord(topology="agg_router", programs=[], engine_fingerprint="")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(
    raw: dict[str, Any] | None = None,
    invocation: Invocation = SERVE_AGG,
    recorded: TopologyRecord | None = None,
) -> ResolvedConfig:
    mock = {"engine": {"backend": "mock"}, "model": {"tokenizer": "bundled"}}
    return resolve(mock | (raw or {}), invocation, recorded)


def test_a_target_chooses_the_topology() -> None:
    assert resolved({"deployment": {"topology": "disagg"}}).topology == "agg"


def test_other_commands_are_about_the_deployed_topology() -> None:
    assert resolved(invocation=STATUS, recorded=RECORD).topology == "agg_router"
    assert resolved(invocation=STATUS).topology == "disagg_router"


def test_router_topologies_route_by_kv_whatever_the_config_says() -> None:
    raw = {"router": {"policy": "random"}}
    assert resolved(raw).router.policy == "random"
    assert resolved(raw, STATUS, RECORD).router.policy == "kv"


def test_api_off_loopback_gets_keys_and_https_a_certificate() -> None:
    assert resolved().frontend.api_keys_file is None
    exposed = resolved({"frontend": {"host": "0.0.0.0", "tls": True}}).frontend
    assert exposed.api_keys_file == API_KEYS_FILE
    assert exposed.tls_cert_file == API_CERTIFICATE_FILE


def test_device_and_dtype_are_never_auto() -> None:
    assert (resolved().device, resolved().dtype) == ("cpu", "float32")


def test_a_node_that_joined_uses_the_configuration_of_its_head(folder: Path) -> None:
    (folder / "run").mkdir()
    write_joined(as_plain(resolved({"frontend": {"port": 9123}}).sections()), folder / "run")
    assert resolved(invocation=STATUS).frontend.port == 9123


def test_a_serve_target_ends_membership_in_another_cluster(folder: Path) -> None:
    (folder / "run").mkdir()
    write_joined(as_plain(resolved({"frontend": {"port": 9123}}).sections()), folder / "run")
    assert resolved().frontend.port == 8000
    assert list((folder / "run").iterdir()) == []


def test_scripts_read_the_same_configuration_back() -> None:
    config = resolved({"workers": {"gpus": [0, 1]}})
    assert read_resolved(as_plain(config)) == config
