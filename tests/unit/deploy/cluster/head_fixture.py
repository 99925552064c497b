"""A head, and the record that it publishes."""

from __future__ import annotations

from typing import Any

from serving.config import MULTINODE, Config, as_plain, nest, parse
from serving.config.resolve import with_topology
from serving.deploy.cluster.addresses import with_head_addresses
from serving.deploy.cluster.agreement import merge
from serving.deploy.cluster.cluster_record import ClusterRecord, code_version
from unit.deploy.resolved import plan_for_test

HEAD = {
    "model": {"id": "org/model", "source": "hub", "revision": "main"},
    "engine": {"block_size": 32, "num_threads": 8, "max_model_len": 4096},
    "cluster": {"address": "10.0.0.1"},
}


def head_config(**more: Any) -> Config:
    config = with_topology(parse(HEAD | more), MULTINODE)
    return with_head_addresses(config)


def record(config: Config, **more: Any) -> ClusterRecord:
    facts = {
        "code": code_version(),
        "config": as_plain(config),
        "dtype": "float32",
        "commit": "abc123",
        "hash_salt": "salt",
        "nats_token": "t",
        "rpc_secret": "s",
    }
    return ClusterRecord(**(facts | more))


def merged(raw: dict[str, Any]) -> Config:
    head = head_config()
    return merge(nest(raw), parse(raw), head, record(head))


def programs_of(config: Config) -> list[str]:
    return list(plan_for_test(config).fingerprints)
