"""What a node takes over from its head, what it keeps, and when it is refused."""

from __future__ import annotations

from typing import Any

import pytest
from serving.config import Config, nest, parse
from serving.deploy.cluster.agreement import differences, require_unique_name
from serving.errors import ConfigError
from serving.protocol import InstanceInfo, ModelCard
from unit.deploy.cluster.head_fixture import head_config, merged, record


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
    assert differences(nest(raw), parse(raw), head, record(head)) == lines


def test_other_code_is_a_difference() -> None:
    head = head_config()
    [line] = differences({}, Config(), head, record(head, code="0.0.1 (0123)"))
    assert line.endswith("0.0.1 (0123) at the head")
    assert differences({}, Config(), head, record(head)) == []


def registered(instance_id: str, address: str) -> InstanceInfo:
    card = ModelCard("m", "", 512, 16, "salt", "f", 0)
    addresses = ["unix:run/w.sock", f"tcp://{address}:4000"]
    return InstanceInfo(instance_id, 1, "prefill", addresses, "", card, 8, 8, 1, "h")


def test_two_machines_cannot_have_one_name() -> None:
    config = merged({"cluster": {"node": "n2"}})
    require_unique_name(config, [registered("prefill-n2-0", "10.0.0.2")], "10.0.0.2")
    require_unique_name(config, [registered("prefill-n20-0", "10.0.0.3")], "10.0.0.2")
    with pytest.raises(ConfigError, match=r"registered already, from tcp://10\.0\.0\.3:4000"):
        require_unique_name(config, [registered("prefill-n2-0", "10.0.0.3")], "10.0.0.2")
