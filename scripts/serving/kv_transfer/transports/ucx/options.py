"""UCX's settings, the interface it listens on, and the address that a worker gives to peers."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated

import msgspec
import psutil

GPU_TRANSPORTS = {"cuda_ipc", "cuda_copy"}
"""UCX needs both: one moves blocks between GPUs, the other lets it touch GPU memory."""

MAX_HOSTS = 32
INFINIBAND = Path("/sys/class/infiniband")


class UcxAddress(msgspec.Struct, frozen=True, array_like=True):
    """What ChannelHello carries: UCX's address of the worker, and the IPv4 addresses that the
    worker's connections come from."""

    worker: Annotated[bytes, msgspec.Meta(min_length=1)]
    hosts: Annotated[list[str], msgspec.Meta(max_length=MAX_HOSTS)]


def ucx_environment(on_gpu: bool) -> dict[str, str]:
    """Variables that UCX reads when it loads. Those that are set already keep their values."""
    return {
        # Where bounce buffers lie, for messages that cannot go directly. ucxx's default needs a GPU.
        "UCX_RNDV_FRAG_MEM_TYPE": "cuda" if on_gpu else "host",
        "UCX_WARN_UNUSED_ENV_VARS": "n",  # ucxx sets some that a build without CUDA does not know
    }


def ucx_options(host: str, infiniband: Path = INFINIBAND) -> dict[str, str]:
    """UCX options for a worker that listens on `host`, without those set in the environment."""
    options = {
        # An endpoint that survives its peer's death cannot use shared memory, and without that
        # promise UCX ends the process when the peer dies. So UCX makes no segments. All other
        # transports stay: network, `cuda_copy` and `cuda_ipc`.
        "TLS": "^sm",
        # The default of 8 KiB halves the speed. Sending must not exceed receiving.
        "TCP_TX_SEG_SIZE": "256k",
        "TCP_RX_SEG_SIZE": "256k",
    }
    # UCX would listen on every interface. With InfiniBand its choice of rails is better than ours.
    if _is_loopback(host) and Path("/sys/class/net/lo").exists():
        options["NET_DEVICES"] = "lo"
    elif (name := _interface_of(host)) and not any(infiniband.glob("*")):
        options["NET_DEVICES"] = name
    return {k: v for k, v in options.items() if f"UCX_{k}" not in os.environ}


def own_hosts(device: str | None) -> list[str]:
    """IPv4 addresses that connections of this worker may come from: those of `device`, or of every
    interface where UCX or the user chooses one.

    None may be missing: UCX connects to itself, and the whole process waits for that.
    """
    interfaces = psutil.net_if_addrs()
    return [
        entry.address
        for name in ([device] if device else interfaces)
        for entry in interfaces.get(name, [])
        if entry.family == socket.AF_INET
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _interface_of(host: str) -> str:
    """The interface that has the address `host`; empty for a name or another machine's address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == host for entry in entries):
            return name
    return ""
