"""The head tells what it serves, and a node that joins takes it over or is refused.

What the head tells lies in etcd, behind mutual TLS, so that `join.pem` is all that a person
carries over: it lets a node read the configuration and the other secrets. What a machine decides
for itself (its GPUs, memory, container) stays its own. A node whose own configuration says
otherwise about the model, whose code differs, or whose engine came out differently, is refused
with the difference.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Config, as_plain, is_loopback, nest, parse
from serving.deploy.cluster.network import advertised_address, interfaces
from serving.deploy.planning.device import resolve_dtype
from serving.deploy.planning.fingerprint import resolve_source
from serving.deploy.planning.source_digest import source_digest
from serving.deploy.processes.certificates import is_join_file
from serving.deploy.processes.credentials import (
    JOIN_FILE,
    NATS_TOKEN_FILE,
    RPC_SECRET_FILE,
    ensure,
    put,
)
from serving.deploy.processes.launchers import RUN
from serving.deploy.processes.markers import write_joined
from serving.discovery import Discovery
from serving.engine.manifest import EngineManifest
from serving.errors import ConfigError, OperatorError
from serving.protocol import InstanceInfo

_TOLD = Path("run/joined.engine")
"""What the head's engine is known by, until this node has its own."""
ANSWER_S = 10.0
_NAME = "cluster"
_OF_THE_NODE = {
    "engine": {
        *("device", "num_threads", "kv_cache_tokens", "host_cache_bytes"),
        *("gpu_memory_fraction", "max_waiting"),
    },
    "deployment": {"start_s", "stop_s"},
    "workers": None,
    "container": None,
}
"""Sections, or keys of them, that each machine decides for itself."""
_MUST_AGREE = ("model", "engine", "tensorrt_llm", "mock", "kv_transfer")


class Cluster(Struct, frozen=True, kw_only=True):
    """What the head tells: `/{namespace}/cluster` in etcd. `config` is complete and resolved."""

    code: str
    config: dict[str, Any]
    dtype: str
    commit: str | None
    hash_salt: str
    nats_token: str
    rpc_secret: str


# --- the head ---------------------------------------------------------------------------------


def with_head_addresses(config: Config) -> Config:
    """`config` with etcd, NATS and workers at `cluster.address`, but for those that were moved already.

    Raises ConfigError when there is no such address.
    """
    cluster = config.cluster
    wanted = cluster.address or os.environ.get("HEAD_NODE_IP") or cluster.head
    if not wanted:
        raise ConfigError(
            "cluster.address",
            "other nodes cannot reach this one, and it does not say where they should",
            remedy=f"set it, or `HEAD_NODE_IP`, to one of: {interfaces()}",
        )
    address = advertised_address(wanted, "cluster.address")
    if is_loopback(address):
        raise ConfigError(
            "cluster.address",
            f"only this machine reaches {address}",
            remedy=f"choose another of: {interfaces()}; on one machine, `serve_disagg_router` will do",
        )
    return _at(config, address, head=None)


def tell(config: Config, manifest: EngineManifest, endpoint: str) -> None:
    """Have the head's etcd, at `endpoint`, say what is served. Raises OperatorError."""
    told = Cluster(
        code=_code(),
        config=as_plain(config),
        dtype=manifest.dtype,
        commit=manifest.commit,
        hash_salt=manifest.hash_salt,
        nats_token=ensure(NATS_TOKEN_FILE),
        rpc_secret=ensure(RPC_SECRET_FILE),
    )

    async def publish() -> None:
        async with Discovery.connect(
            endpoint, config.deployment.namespace, join_file=JOIN_FILE
        ) as discovery:
            await discovery.publish(_NAME, msgspec.json.encode(told), ANSWER_S)

    asyncio.run(publish())


# --- a node that joins ------------------------------------------------------------------------


def join(raw: Mapping[str, Any], *, write: bool) -> dict[str, Any]:
    """The configuration of this node: the head's, with what is its own. With `write`, it and the
    secrets are kept for the other commands.

    Raises OperatorError when the head cannot be asked, and for what does not agree with it.
    """
    own = parse(raw)
    host, port = _head(own)
    join_file = _join_file(own)
    told, instances = asyncio.run(_ask(host, port, own.deployment.namespace, join_file))
    address = _own_address(own, host, port)
    head_config = msgspec.convert(told.config, Config)
    differences = [*_code_difference(told), *_config_differences(nest(raw), own, head_config, told)]
    if differences:
        raise OperatorError(
            "this node does not fit the head at "
            + host
            + ":\n"
            + "\n".join(f"  {line}" for line in differences),
            remedy="make them agree, or leave the keys out here: a node takes the head's",
        )
    config = _merged(nest(raw), own, head_config, told)
    config = _at(config, address, head=host)
    config = _with_planes_of_head(config, host, port)
    _require_dtype(config, told)
    _require_own_name(config, instances, address)
    if write:
        for file, secret in (
            (NATS_TOKEN_FILE, told.nats_token),
            (RPC_SECRET_FILE, told.rpc_secret),
            (JOIN_FILE, join_file.read_text()),
        ):
            put(file, secret, anew=True)
        write_joined(as_plain(config), RUN)
        _TOLD.write_bytes(msgspec.json.encode({"hash_salt": told.hash_salt}))
    return as_plain(config)


def require_same_engine(manifest: EngineManifest) -> None:
    """Raises OperatorError when this node's engine would cache under other hashes than the head's."""
    expected = msgspec.json.decode(_TOLD.read_bytes())["hash_salt"]
    if manifest.hash_salt != expected:
        raise OperatorError(
            f"this node's engine is not the head's: {manifest.hash_salt} here, {expected} there "
            "(model, content and dtype)",
            remedy="give both the same files: `rsync -t` keeps the times that large local ones "
            "are known by",
        )


async def _ask(
    host: str, port: int, namespace: str, join_file: Path
) -> tuple[Cluster, list[InstanceInfo]]:
    async with Discovery.connect(
        f"{host}:{port}", namespace, join_file=str(join_file)
    ) as discovery:
        try:
            told = await discovery.published(_NAME, ANSWER_S)
        except OperatorError as exc:
            raise OperatorError(
                exc.what,
                remedy=f"is {host}:{port} the head, does it serve, and is {join_file} a copy of "
                "its run/secrets/join.pem?",
            ) from None
        instances = await discovery.instances(ANSWER_S)
    if told is None:
        raise OperatorError(
            f"nothing is served under the namespace {namespace!r} at {host}:{port} yet",
            remedy="start `snakemake serve_disagg_multinode` there, and wait until it says so",
        )
    try:
        return msgspec.json.decode(told, type=Cluster), instances
    except msgspec.MsgspecError as exc:
        raise OperatorError(
            f"what the head at {host}:{port} tells cannot be read: {exc}",
            remedy="check out the same commit on both",
        ) from None


def _head(own: Config) -> tuple[str, int]:
    """Address and port of the head's etcd."""
    where = own.cluster.head or ""
    if endpoints := os.environ.get("ETCD_ENDPOINTS"):
        where = where or endpoints.split(",")[0].partition("://")[2] or endpoints.split(",")[0]
    where = where or os.environ.get("HEAD_NODE_IP", "")
    if not where:
        raise ConfigError(
            "cluster.head",
            "which head should this node join?",
            remedy="`snakemake join --config cluster-head=ADDRESS`, or set HEAD_NODE_IP",
        )
    name, _, number = where.rpartition(":") if where.count(":") == 1 else (where, "", "")
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        return str(found[0][4][0]), int(number or own.etcd.port)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            "cluster.head", f"{where!r} is no IPv4 address or name of a host ({exc})"
        ) from None


def _join_file(own: Config) -> Path:
    path = Path(own.cluster.join_file).expanduser()
    remedy = f"copy it from the head: scp HEAD:DEPLOYMENT/{JOIN_FILE} {own.cluster.join_file}"
    try:
        text = path.read_text()
    except OSError as exc:
        raise ConfigError("cluster.join_file", f"{path}: {exc.strerror}", remedy=remedy) from None
    if not is_join_file(text):
        raise ConfigError("cluster.join_file", f"{path} is no join file", remedy=remedy)
    return path


def _own_address(own: Config, host: str, port: int) -> str:
    if own.cluster.address is not None:
        return advertised_address(own.cluster.address, "cluster.address")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing, and shows the way there
        return str(probe.getsockname()[0])


def _code() -> str:
    return f"{metadata.version('snakemake-serving')} ({source_digest('worker')})"


def _code_difference(told: Cluster) -> list[str]:
    own = _code()
    return [] if told.code == own else [f"version: {own} here, {told.code} at the head"]


def _config_differences(
    raw: Mapping[str, Any], own: Config, head: Config, told: Cluster
) -> list[str]:
    """Keys that were set here, to something that is neither the default nor the head's."""
    lines = []
    for section in _MUST_AGREE:
        for key in raw.get(section) or {}:
            if key in (_OF_THE_NODE.get(section) or ()):
                continue
            mine, theirs = getattr(getattr(own, section), key), getattr(getattr(head, section), key)
            default = getattr(getattr(Config(), section), key)
            same = mine in (theirs, default)
            if (section, key) == ("model", "revision"):
                same = same or mine == told.commit
                theirs = told.commit or theirs
            if not same:
                lines.append(f"{section}.{key}: {mine!r} here, {theirs!r} at the head")
    return lines


def _merged(raw: Mapping[str, Any], own: Config, head: Config, told: Cluster) -> Config:
    """The head's configuration with this machine's own keys in it."""
    plain, mine = as_plain(head), as_plain(own)
    for section, keys in _OF_THE_NODE.items():
        for key in raw.get(section) or {}:
            if keys is None or key in keys:
                plain[section][key] = mine[section][key]
    plain["cluster"] = mine["cluster"]
    plain["network"] = as_plain(Config())["network"] | dict(raw.get("network") or {})
    if told.commit is not None and resolve_source(head.model) == "hub":
        plain["model"]["revision"] = told.commit  # what the head's revision means may move on
    return msgspec.convert(plain, Config)


def _at(config: Config, address: str, head: str | None) -> Config:
    """Everything at `address` that others should reach, unless it is somewhere else already."""
    replace, default = msgspec.structs.replace, Config()
    node = config.cluster.node or address.replace(".", "-").replace(":", "-").strip("-")

    def moved(host: str, usual: str) -> str:
        return address if host == usual else host

    network = config.network
    changed: dict[str, Any] = {
        "cluster": replace(config.cluster, node=node, head=head, address=address),
        "network": replace(
            network,
            rpc_host=moved(network.rpc_host, default.network.rpc_host),
            kv_host=moved(network.kv_host, default.network.kv_host),
        ),
    }
    if head is None:
        changed["etcd"] = replace(config.etcd, host=moved(config.etcd.host, default.etcd.host))
        changed["nats"] = replace(config.nats, host=moved(config.nats.host, default.nats.host))
    return replace(config, **changed)


def _with_planes_of_head(config: Config, host: str, port: int) -> Config:
    """Where this node reaches them, which need not be where the head listens."""
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


def _require_dtype(config: Config, told: Cluster) -> None:
    own = resolve_dtype(config)
    if own != told.dtype:
        raise OperatorError(
            f"this node would compute in {own}, and the head in {told.dtype}",
            remedy=f"set `engine.dtype: {told.dtype}` at the head, which both then use, or the "
            "same `engine.device` on both",
        )


def _require_own_name(config: Config, instances: list[InstanceInfo], address: str) -> None:
    """Two machines of one name would take each other's registrations over."""
    for info in instances:
        if not info.instance_id.startswith(f"{config.cluster.role}-{config.cluster.node}-"):
            continue
        places = [a for a in info.rpc_addresses if a.startswith("tcp://")]
        if all(place.rpartition(":")[0] != f"tcp://{address}" for place in places):
            raise ConfigError(
                "cluster.node",
                f"{info.instance_id} is registered already, from {', '.join(places)}",
                remedy="give this node a name of its own, or leave it out",
            )
