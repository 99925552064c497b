"""From what the person wrote to what it means for this run: `resolve`, in stages.

Called while the Snakefile is parsed, so it imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from serving.config import MULTINODE, Config, ResolvedConfig, Topology, parse
from serving.config.resolve import resolved_config, with_topology
from serving.deploy.cluster.addresses import with_head_addresses
from serving.deploy.cluster.joined import JOINED, read_joined
from serving.deploy.cluster.network import with_listen_addresses
from serving.deploy.containers.image_recipes import with_built_image
from serving.deploy.planning.device import resolve_device, resolve_dtype
from serving.deploy.planning.fingerprint import engine_fingerprint, model_key
from serving.deploy.planning.invocation import Invocation
from serving.deploy.planning.machine import this_machine
from serving.deploy.processes.launchers import RUN
from serving.deploy.processes.topology_record import TopologyRecord
from serving.deploy.security.api_access import api_keys_file, with_certificate_files


def resolve(
    raw: Mapping[str, Any], invocation: Invocation, recorded: TopologyRecord | None
) -> ResolvedConfig:
    """The stages, in order. `raw` is the YAML's content, `recorded` what is deployed here.

    Raises OperatorError when a stage cannot succeed.
    """
    raw, from_head = _keys_for_this_node(raw, invocation)
    config = parse(raw)
    is_head = (invocation.topology or config.deployment.topology) == MULTINODE and not from_head
    config = with_topology(config, _choose_topology(config, invocation, recorded))
    config = _with_addresses(config, is_head=is_head)
    config = _with_credentials(config)
    config = with_built_image(config)
    machine = this_machine()
    return resolved_config(
        config,
        device=resolve_device(config, machine),
        dtype=resolve_dtype(config, machine),
        engine_fingerprint=engine_fingerprint(config, machine),
        model_key=model_key(config.model, config.engine.weights),
    )


def _keys_for_this_node(
    raw: Mapping[str, Any], invocation: Invocation
) -> tuple[Mapping[str, Any], bool]:
    """On a node that joins, or joined before: the head's configuration with the node's own keys,
    and True. Otherwise `raw` and False."""
    if invocation.joins:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # failures are reported in our words
        from serving.deploy.cluster.join import join  # its libraries are slow to load

        return join(raw, write=invocation.executes), True
    if invocation.serves:
        if invocation.executes:
            (RUN / JOINED).unlink(missing_ok=True)
        return raw, False
    joined = read_joined(RUN)
    return (raw, False) if joined is None else (joined, True)


def _choose_topology(
    config: Config, invocation: Invocation, recorded: TopologyRecord | None
) -> Topology:
    """The one that a target names. Other commands are about what is deployed."""
    if invocation.topology is not None:
        return invocation.topology
    if recorded is not None and not invocation.serves:
        return recorded.topology
    return config.deployment.topology


def _with_addresses(config: Config, *, is_head: bool) -> Config:
    """Addresses to listen on, where the person wrote networks or interfaces, or a head's address."""
    if is_head:
        config = with_head_addresses(config)
    return with_listen_addresses(config)


def _with_credentials(config: Config) -> Config:
    """Off loopback there are API keys, and HTTPS has a certificate."""
    frontend = replace(config.frontend, api_keys_file=api_keys_file(config.frontend))
    return replace(config, frontend=with_certificate_files(frontend))
