"""Join a head: take over its configuration and secrets, or be refused with the differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from serving.config import Config, as_plain, nest, parse
from serving.deploy.cluster.addresses import head_address, node_address, with_node_addresses
from serving.deploy.cluster.agreement import (
    differences,
    merge,
    require_same_dtype,
    require_unique_name,
)
from serving.deploy.cluster.cluster_record import fetch_cluster
from serving.deploy.cluster.joined import write_joined
from serving.deploy.processes.launchers import RUN
from serving.deploy.security.certificates import is_join_file
from serving.deploy.security.secret_files import (
    JOIN_FILE,
    NATS_TOKEN_FILE,
    RPC_SECRET_FILE,
    write_secret,
)
from serving.engine.manifest import EngineManifest
from serving.errors import ConfigError, OperatorError

_HEAD_ENGINE = RUN / "joined.engine"
"""The hash salt of the head's engine, until this node has built its own."""


def join(raw: Mapping[str, Any], *, write: bool) -> dict[str, Any]:
    """The configuration of this node: the head's, with the node's own keys in it.

    With `write`, it and the secrets are kept for the other commands. Raises OperatorError when the
    head does not answer, or when this node does not agree with it.
    """
    own = parse(raw)
    host, port = head_address(own)
    join_file = require_join_file(own)
    record, instances = fetch_cluster(host, port, own.deployment.namespace, join_file)
    address = node_address(own, host, port)
    head = msgspec.convert(record.config, Config)
    if lines := differences(nest(raw), own, head, record):
        listed = "\n".join(f"  {line}" for line in lines)
        raise OperatorError(
            f"this node does not fit the head at {host}:\n{listed}",
            remedy="make them agree, or leave the keys out here: a node takes the head's",
        )
    config = merge(nest(raw), own, head, record)
    config = with_node_addresses(config, address, host, port)
    require_same_dtype(config, record)
    require_unique_name(config, instances, address)
    if write:
        secrets = {
            NATS_TOKEN_FILE: record.nats_token,
            RPC_SECRET_FILE: record.rpc_secret,
            JOIN_FILE: join_file.read_text(),
        }
        for file, secret in secrets.items():
            write_secret(file, secret, anew=True)
        write_joined(as_plain(config), RUN)
        _HEAD_ENGINE.write_bytes(msgspec.json.encode({"hash_salt": record.hash_salt}))
    return as_plain(config)


def require_same_engine(manifest: EngineManifest) -> None:
    """Raises OperatorError when this node's engine would hash blocks differently than the head's."""
    expected = msgspec.json.decode(_HEAD_ENGINE.read_bytes())["hash_salt"]
    if manifest.hash_salt != expected:
        raise OperatorError(
            f"this node's engine differs from the head's: {manifest.hash_salt} here, {expected} "
            "there (model, content and dtype)",
            remedy="give both the same files: `rsync -t` keeps the times by which large local "
            "files are compared",
        )


def require_join_file(own: Config) -> Path:
    """`cluster.join_file`. Raises ConfigError when it is missing or not a join file."""
    path = Path(own.cluster.join_file).expanduser()
    remedy = f"copy it from the head: scp HEAD:DEPLOYMENT/{JOIN_FILE} {own.cluster.join_file}"
    try:
        text = path.read_text()
    except OSError as exc:
        raise ConfigError("cluster.join_file", f"{path}: {exc.strerror}", remedy=remedy) from None
    if not is_join_file(text):
        raise ConfigError("cluster.join_file", f"{path} is not a join file", remedy=remedy)
    return path
