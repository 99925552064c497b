"""The record that the head publishes in its etcd, for nodes that join.

etcd demands mutual TLS here, so `join.pem` is the only file that a person copies: with it, a node
may read the configuration and the other secrets.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Config, as_plain
from serving.deploy.planning.source_digest import source_digest
from serving.deploy.security.secret_files import (
    JOIN_FILE,
    NATS_TOKEN_FILE,
    RPC_SECRET_FILE,
    ensure_secret,
)
from serving.discovery import Discovery
from serving.engine.manifest import EngineManifest
from serving.errors import OperatorError
from serving.protocol import InstanceInfo

ANSWER_S = 10.0
_KEY = "cluster"


class ClusterRecord(Struct, frozen=True, kw_only=True):
    """`/{namespace}/cluster` in etcd. `config` is complete and resolved.

    `code` identifies the version of this project, `hash_salt` the engine.
    """

    code: str
    config: dict[str, Any]
    dtype: str
    commit: str | None
    hash_salt: str
    nats_token: str
    rpc_secret: str


def publish_cluster(config: Config, manifest: EngineManifest, endpoint: str) -> None:
    """Publish the head's record in its etcd at `endpoint`. Raises OperatorError."""
    record = ClusterRecord(
        code=code_version(),
        config=as_plain(config),
        dtype=manifest.dtype,
        commit=manifest.commit,
        hash_salt=manifest.hash_salt,
        nats_token=ensure_secret(NATS_TOKEN_FILE),
        rpc_secret=ensure_secret(RPC_SECRET_FILE),
    )

    async def publish() -> None:
        async with Discovery.connect(
            endpoint, config.deployment.namespace, join_file=JOIN_FILE
        ) as discovery:
            await discovery.publish(_KEY, msgspec.json.encode(record), ANSWER_S)

    asyncio.run(publish())


def fetch_cluster(
    host: str, port: int, namespace: str, join_file: Path
) -> tuple[ClusterRecord, list[InstanceInfo]]:
    """The head's record, and the instances that are registered now.

    Raises OperatorError when the head does not answer, or has published nothing.
    """
    return asyncio.run(_fetch(host, port, namespace, join_file))


async def _fetch(
    host: str, port: int, namespace: str, join_file: Path
) -> tuple[ClusterRecord, list[InstanceInfo]]:
    async with Discovery.connect(
        f"{host}:{port}", namespace, join_file=str(join_file)
    ) as discovery:
        try:
            content = await discovery.published(_KEY, ANSWER_S)
        except OperatorError as exc:
            raise OperatorError(
                exc.what,
                remedy=f"check that {host}:{port} is the head, that it serves, and that "
                f"{join_file} is a copy of its run/secrets/join.pem",
            ) from None
        instances = await discovery.instances(ANSWER_S)
    if content is None:
        raise OperatorError(
            f"nothing is served under the namespace {namespace!r} at {host}:{port} yet",
            remedy="start `snakemake serve_disagg_multinode` there, and wait until it is ready",
        )
    try:
        return msgspec.json.decode(content, type=ClusterRecord), instances
    except msgspec.MsgspecError as exc:
        raise OperatorError(
            f"the record of the head at {host}:{port} cannot be read: {exc}",
            remedy="check out the same commit on both",
        ) from None


def code_version() -> str:
    """The version of this project and a digest of the code that workers run."""
    return f"{metadata.version('snakemake-serving')} ({source_digest('worker')})"
