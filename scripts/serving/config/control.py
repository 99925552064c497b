"""The sections of the control services: `etcd` for discovery, `nats` for events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from serving.config.base import Port, Section
from serving.errors import ConfigError


class EtcdConfig(Section, frozen=True):
    """Discovery."""

    host: Annotated[
        str,
        Meta(
            description="Address, network or interface to listen on. Off loopback etcd uses mutual TLS, with certificates that the first start creates."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Client port.")] = 2379
    peer_port: Annotated[Port, Meta(description="Peer port, on loopback.")] = 2380
    lease_s: Annotated[
        Annotated[int, Meta(ge=2)],
        Meta(description="A worker that stops renewing its lease disappears after this time."),
    ] = 10


class NatsConfig(Section, frozen=True):
    """KV events, load reports and control messages."""

    host: Annotated[str, Meta(description="Address, network or interface to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Meta(description="Client port.")] = 4222


def check_ports(ports: Mapping[str, int]) -> None:
    """`ports` maps config keys to ports. Raises ConfigError when two of them are the same."""
    first_key: dict[int, str] = {}
    for key, port in ports.items():
        if port in first_key:
            raise ConfigError(
                key, f"port {port} is already `{first_key[port]}`", remedy="choose another port"
            )
        first_key[port] = key
