"""The addresses of a deployment on several machines: where the head is, and where each one listens."""

from __future__ import annotations

import os
import socket
from typing import Any

import msgspec

from serving.config import Config, is_loopback
from serving.deploy.cluster.network import advertised_address, interfaces
from serving.errors import ConfigError, OperatorError


def with_head_addresses(config: Config) -> Config:
    """`config` with etcd, NATS and workers at `cluster.address`, unless they were moved already.

    Raises ConfigError when there is no such address.
    """
    cluster = config.cluster
    wanted = cluster.address or os.environ.get("HEAD_NODE_IP") or cluster.head
    if not wanted:
        raise ConfigError(
            "cluster.address",
            "is not set, so other nodes do not know how to reach this one",
            remedy=f"set it, or `HEAD_NODE_IP`, to one of: {interfaces()}",
        )
    address = advertised_address(wanted, "cluster.address")
    if is_loopback(address):
        raise ConfigError(
            "cluster.address",
            f"only this machine reaches {address}",
            remedy=f"choose another of: {interfaces()}; on one machine, use `serve_disagg_router`",
        )
    config = _with_worker_addresses(config, address, head=None)
    default = Config()
    return msgspec.structs.replace(
        config,
        etcd=msgspec.structs.replace(
            config.etcd, host=_moved(config.etcd.host, default.etcd.host, address)
        ),
        nats=msgspec.structs.replace(
            config.nats, host=_moved(config.nats.host, default.nats.host, address)
        ),
    )


def with_node_addresses(config: Config, address: str, head_host: str, head_port: int) -> Config:
    """`config` of a node at `address`: its workers there, and the head's etcd and NATS.

    Raises OperatorError for a NATS_SERVER that cannot be read.
    """
    config = _with_worker_addresses(config, address, head=head_host)
    return with_control_services_of_head(config, head_host, head_port)


def with_control_services_of_head(config: Config, host: str, port: int) -> Config:
    """`config` with etcd and NATS where this node reaches them.

    That may differ from where the head listens. Raises OperatorError for a NATS_SERVER that cannot
    be read.
    """
    replace = msgspec.structs.replace
    everywhere = config.nats.host in {"0.0.0.0", "::"}
    nats_host, nats_port = host if everywhere else config.nats.host, config.nats.port
    if server := os.environ.get("NATS_SERVER"):
        name, _, number = server.rpartition("/")[2].rpartition(":")
        if not name or not number.isdigit():
            raise OperatorError(
                f"NATS_SERVER is {server!r}", remedy="write it as nats://HOST:PORT, or unset it"
            )
        nats_host, nats_port = name, int(number)
    return replace(
        config,
        etcd=replace(config.etcd, host=host, port=port),
        nats=replace(config.nats, host=nats_host, port=nats_port),
    )


def head_address(own: Config) -> tuple[str, int]:
    """Address and port of the head's etcd. Raises ConfigError when no head is named."""
    where = own.cluster.head or ""
    if endpoints := os.environ.get("ETCD_ENDPOINTS"):
        where = where or endpoints.split(",")[0].partition("://")[2] or endpoints.split(",")[0]
    where = where or os.environ.get("HEAD_NODE_IP", "")
    if not where:
        raise ConfigError(
            "cluster.head",
            "is not set, so this node does not know which head to join",
            remedy="`snakemake join --config cluster-head=ADDRESS`, or set HEAD_NODE_IP",
        )
    name, _, number = where.rpartition(":") if where.count(":") == 1 else (where, "", "")
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        return str(found[0][4][0]), int(number or own.etcd.port)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            "cluster.head", f"{where!r} is not an IPv4 address or the name of a host ({exc})"
        ) from None


def node_address(own: Config, head_host: str, head_port: int) -> str:
    """The address of this node: configured, or on the way to the head."""
    if own.cluster.address is not None:
        return advertised_address(own.cluster.address, "cluster.address")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head_host, head_port))  # sends nothing, but picks the way there
        return str(probe.getsockname()[0])


def _with_worker_addresses(config: Config, address: str, head: str | None) -> Config:
    """Workers listen at `address`, unless they were moved already."""
    replace, default = msgspec.structs.replace, Config()
    node = config.cluster.node or address.replace(".", "-").replace(":", "-").strip("-")
    network = config.network
    changed: dict[str, Any] = {
        "cluster": replace(config.cluster, node=node, head=head, address=address),
        "network": replace(
            network,
            rpc_host=_moved(network.rpc_host, default.network.rpc_host, address),
            kv_host=_moved(network.kv_host, default.network.kv_host, address),
        ),
    }
    return replace(config, **changed)


def _moved(host: str, default: str, address: str) -> str:
    return address if host == default else host
