"""From what a person wrote (address, network or interface) to the address to listen on."""

from __future__ import annotations

import ipaddress
import socket

import msgspec
import psutil

from serving.config import Config
from serving.errors import ConfigError


def listening(config: Config) -> Config:
    """`config` with addresses alone in every `host`. Raises ConfigError for what is not here."""
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
        f"{wanted!r} is no address, and no network or interface that this machine has one in",
        remedy=f"choose from: {interfaces()}",
    )


def interfaces() -> str:
    """This machine's, with their addresses, for a person to choose from."""
    return ", ".join(f"{name} ({' '.join(a)})" for name, a in sorted(_addresses().items()))


def advertised_address(wanted: str, key: str) -> str:
    """As `listen_address`, for one that others are told to connect to."""
    host = listen_address(wanted, key)
    if is_address(host) and ipaddress.ip_address(host).is_unspecified:
        raise ConfigError(
            key,
            f"nobody can connect to {host}, and workers advertise where they listen",
            remedy="name the interface or the network that the other machines reach",
        )
    return host


def _addresses() -> dict[str, list[str]]:
    """Addresses by interface, but for those that mean nothing without the name of one."""
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
