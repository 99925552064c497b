"""From the address, network or interface in the config to the address to listen on."""

from __future__ import annotations

import ipaddress
import socket

import msgspec
import psutil

from serving.config import Config
from serving.errors import ConfigError


def with_listen_addresses(config: Config) -> Config:
    """`config` with an address in every `host`. Raises ConfigError when this machine has none."""
    replace = msgspec.structs.replace
    network = replace(
        config.network,
        rpc_host=advertised_address(config.network.rpc_host, "network.rpc_host"),
        kv_host=advertised_address(config.network.kv_host, "network.kv_host"),
    )
    return replace(
        config,
        network=network,
        frontend=replace(
            config.frontend, host=listen_address(config.frontend.host, "frontend.host")
        ),
        nats=replace(config.nats, host=listen_address(config.nats.host, "nats.host")),
        etcd=replace(config.etcd, host=listen_address(config.etcd.host, "etcd.host")),
    )


def listen_address(wanted: str, key: str) -> str:
    """An address or `localhost` as it is; else the first address of this machine within a
    network (`10.1.0.0/16`) or of an interface, IPv4 first."""
    if wanted == "localhost" or is_address(wanted):
        return wanted
    by_interface = _addresses()
    everywhere = sorted((a for found in by_interface.values() for a in found), key=_v4_first)
    try:
        network = ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        found = sorted(by_interface.get(wanted, []), key=_v4_first)
    else:
        found = [address for address in everywhere if ipaddress.ip_address(address) in network]
    if found:
        return found[0]
    raise ConfigError(
        key,
        f"{wanted!r} is not an address, nor a network or interface of this machine",
        remedy=f"choose from: {interfaces()}",
    )


def interfaces() -> str:
    """The interfaces of this machine and their addresses, as text to choose from."""
    return ", ".join(f"{name} ({' '.join(a)})" for name, a in sorted(_addresses().items()))


def advertised_address(wanted: str, key: str) -> str:
    """Like `listen_address`, for an address that other machines connect to."""
    host = listen_address(wanted, key)
    if is_address(host) and ipaddress.ip_address(host).is_unspecified:
        raise ConfigError(
            key,
            f"other machines cannot connect to {host}, and workers advertise the address they listen on",
            remedy="name the interface or the network that the other machines reach",
        )
    return host


def _addresses() -> dict[str, list[str]]:
    """Addresses by interface, without those that need an interface's name to be used."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address:
                found.setdefault(name, []).append(entry.address)
    return found


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _v4_first(address: str) -> bool:
    return ":" in address
