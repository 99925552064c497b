"""Moving KV blocks between workers, over UCX, NIXL or plain TCP."""

from __future__ import annotations

from typing import Literal

from serving.kv_layout import KvLayout
from serving.kv_transfer.base import KvTransfer


def make_transfer(
    name: Literal["ucx", "tcp", "nixl"],
    layout: KvLayout,
    *,
    host: str,
    chunk_bytes: int | None,
    connect_s: float,
    transfer_s: float,
    device: str = "cpu",
    in_place: bool = True,
) -> KvTransfer:
    """The transport called `name` (`kv_transfer.transport`); its library loads in `serve`.

    See `KvTransfer` for `chunk_bytes`, `device` and `in_place`.
    """
    transport: type[KvTransfer]
    if name == "nixl":
        from serving.kv_transfer.nixl import NixlTransfer as transport
    elif name == "ucx":
        from serving.kv_transfer.ucx import UcxTransfer as transport
    else:
        from serving.kv_transfer.tcp import TcpTransfer as transport
    return transport(
        layout,
        host=host,
        chunk_bytes=chunk_bytes,
        connect_s=connect_s,
        transfer_s=transfer_s,
        device=device,
        in_place=in_place,
    )
