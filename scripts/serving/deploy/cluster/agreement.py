"""What a node must have in common with its head, and which settings each machine decides itself.

A node takes the head's settings. Its own GPUs, memory and container stay its own. A node whose code
differs, or whose configuration contradicts the head's about the model, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from serving.config import Config, as_plain
from serving.deploy.cluster.cluster_record import ClusterRecord, code_version
from serving.deploy.planning.device import resolve_dtype
from serving.deploy.planning.fingerprint import resolve_source
from serving.errors import ConfigError, OperatorError
from serving.protocol import InstanceInfo

_OWN_KEYS = {
    "engine": {
        *("device", "num_threads", "kv_cache_tokens", "host_cache_bytes"),
        *("gpu_memory_fraction", "max_waiting"),
    },
    "deployment": {"start_s", "stop_s"},
    "workers": None,
    "container": None,
}
"""Keys that each machine decides itself, by section; None: the whole section."""
_MUST_AGREE = ("model", "engine", "tensorrt_llm", "mock", "kv_transfer")


def differences(
    raw: Mapping[str, Any], own: Config, head: Config, record: ClusterRecord
) -> list[str]:
    """One line for each difference that keeps this node from joining.

    A key counts only when it was set here, to a value that is neither the default nor the head's.
    """
    lines = []
    if (code := code_version()) != record.code:
        lines.append(f"version: {code} here, {record.code} at the head")
    for section in _MUST_AGREE:
        for key in raw.get(section) or {}:
            if key in (_OWN_KEYS.get(section) or ()):
                continue
            mine, theirs = getattr(getattr(own, section), key), getattr(getattr(head, section), key)
            default = getattr(getattr(Config(), section), key)
            same = mine in (theirs, default)
            if (section, key) == ("model", "revision"):
                same = same or mine == record.commit
                theirs = record.commit or theirs
            if not same:
                lines.append(f"{section}.{key}: {mine!r} here, {theirs!r} at the head")
    return lines


def merge(raw: Mapping[str, Any], own: Config, head: Config, record: ClusterRecord) -> Config:
    """The head's configuration with this machine's own keys in it."""
    plain, mine = as_plain(head), as_plain(own)
    for section, keys in _OWN_KEYS.items():
        for key in raw.get(section) or {}:
            if keys is None or key in keys:
                plain[section][key] = mine[section][key]
    plain["cluster"] = mine["cluster"]
    plain["network"] = as_plain(Config())["network"] | dict(raw.get("network") or {})
    if record.commit is not None and resolve_source(head.model) == "hub":
        plain["model"]["revision"] = record.commit  # a branch may have moved on since
    return msgspec.convert(plain, Config)


def require_same_dtype(config: Config, record: ClusterRecord) -> None:
    """Raises OperatorError when this node would compute in another type than the head."""
    own = resolve_dtype(config)
    if own != record.dtype:
        raise OperatorError(
            f"this node would compute in {own}, and the head in {record.dtype}",
            remedy=f"set `engine.dtype: {record.dtype}` at the head, which both then use, or the "
            "same `engine.device` on both",
        )


def require_unique_name(config: Config, instances: list[InstanceInfo], address: str) -> None:
    """Raises ConfigError when another machine has this node's name.

    Two machines of one name would take over each other's registrations.
    """
    for info in instances:
        if not info.instance_id.startswith(f"{config.cluster.role}-{config.cluster.node}-"):
            continue
        addresses = [entry for entry in info.rpc_addresses if entry.startswith("tcp://")]
        if all(entry.rpartition(":")[0] != f"tcp://{address}" for entry in addresses):
            raise ConfigError(
                "cluster.node",
                f"{info.instance_id} is registered already, from {', '.join(addresses)}",
                remedy="give this node a name of its own, or leave the key out",
            )
