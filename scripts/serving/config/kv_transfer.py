"""The `kv_transfer` section."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Positive, Seconds, Section
from serving.errors import ConfigError

_TRANSPORTS = {"torch": ("ucx", "nixl", "tcp"), "tensorrt_llm": ("ucx", "nixl")}
"""Transports of each engine. The mock engine transfers nothing and accepts all."""


class KvTransferConfig(Section, frozen=True):
    """How KV blocks travel from prefill to decode workers."""

    transport: Annotated[
        Literal["ucx", "tcp", "nixl"],
        Meta(
            description="`ucx`: for production. `nixl`: with the torch engine, install `nixl-cu13` first. `tcp`: plain TCP, torch engine only."
        ),
    ] = "ucx"
    connect_s: Annotated[Seconds, Meta(description="Deadline for reaching the prefill worker.")] = (
        5.0
    )
    transfer_s: Annotated[
        Seconds,
        Meta(
            description="Longest deadline for one request's blocks. It is shorter, by the size and by the pace of earlier transfers, once there were any: at least 3 s."
        ),
    ] = 30.0
    hold_s: Annotated[
        Seconds,
        Meta(description="A prefill worker frees blocks that nobody fetched after this time."),
    ] = 60.0
    overlap: Annotated[
        bool,
        Meta(
            description="Fetch the finished blocks of a long prompt while its other chunks compute (torch engine)."
        ),
    ] = True
    chunk_bytes: Annotated[
        Positive | None,
        Meta(
            description="Largest message in bytes; larger transfers are pipelined. Default: 8 MiB; between GPUs 256 MiB."
        ),
    ] = None
    in_place: Annotated[
        bool,
        Meta(
            description="Between GPUs of one host, decode workers read blocks directly from the prefill worker's pool (CUDA IPC), with any transport (torch engine)."
        ),
    ] = True


def check_transport(transport: str, backend: str) -> None:
    """Raises ConfigError when the engine cannot transfer KV this way."""
    suitable = _TRANSPORTS.get(backend)
    if suitable is not None and transport not in suitable:
        raise ConfigError(
            "kv_transfer.transport",
            f"the {backend} engine has no `{transport}`",
            remedy=f"choose `{'` or `'.join(suitable)}`",
        )
