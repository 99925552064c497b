"""What a person reads once the service runs: its URL, a command to try, and how nodes join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from serving.config import MULTINODE, EtcdConfig, ResolvedConfig, connect_address
from serving.config.resolve import topology_roles
from serving.deploy.security.api_access import url_scheme
from serving.deploy.security.secret_files import API_AUTHORITY_FILE, API_CERTIFICATE_FILE, JOIN_FILE


def announce_service(config: ResolvedConfig) -> str:
    """The URL and a `curl` command; on the head of several machines also how the others join."""
    listen = config.frontend
    url = f"{url_scheme(listen)}://{connect_address(listen.host, listen.port)}"
    generated = listen.tls_cert_file == API_CERTIFICATE_FILE
    trusting = f" --cacert {API_AUTHORITY_FILE}" if generated else ""
    model = config.model_name
    body = msgspec.json.encode({"model": model, "prompt": "Hello", "max_tokens": 16}).decode()
    dummy = config.engine.weights == "dummy"
    noise = " with dummy weights, so answers are noise," if dummy else ""
    keys = listen.api_keys_file
    bearer = f" -H \"authorization: Bearer $(head -n 1 '{keys}')\"" if keys else ""
    return (
        f"\nServing {model} ({config.topology}){noise} at {url}/v1. Try:\n"
        f"  curl -s{trusting} {url}/v1/completions -H 'content-type: application/json'{bearer} -d '{body}'"
        + (_invitation(config) if config.topology == MULTINODE else "")
    )


def announce_joined(config: ResolvedConfig, workers: Sequence[str]) -> str:
    """The head that this node joined, and its workers' names."""
    names = ", ".join(name.removeprefix("worker-") for name in workers)
    return f"\nJoined {config.cluster.head} with {names}."


def announce_incomplete(missing: Mapping[str, str], target: str) -> str:
    """What a run left out, or what ended since: `missing` maps program names to what is wrong."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return (
        f"\nThis run is over, and the service is not complete: {listed}.\n"
        f"  -> run `snakemake {target}` without options that leave steps out"
    )


def _invitation(config: ResolvedConfig) -> str:
    head, port = config.cluster.address, config.etcd.port
    address = f"{head}:{port}" if port != EtcdConfig().port else head
    roles = topology_roles(config.topology)
    missing = [role for role in roles if role not in config.cluster.head_roles]
    role = missing[0] if missing else "prefill"
    return (
        f"\nOther nodes join with a copy of {JOIN_FILE} as join.pem:\n"
        f"  snakemake join --cores all --config cluster-head={address} cluster-role={role}"
    )
