"""etcd and NATS as programs, and how the other programs reach them."""

from __future__ import annotations

import json

from serving.config import Config, connect_address, is_loopback
from serving.config.process import ControlServices
from serving.deploy.planning.program import Program, program_fingerprint
from serving.deploy.security.secret_files import (
    AUTHORITY_FILE,
    ETCD_SERVER_FILE,
    JOIN_FILE,
    NATS_TOKEN_FILE,
    RPC_SECRET_FILE,
)

NATS_TOKEN = "@TOKEN@"
"""Stands for the token in `nats.conf` until the file is written: plans hold no secrets."""


def control_services(config: Config) -> ControlServices:
    """Where workers and frontend find etcd and NATS."""
    return ControlServices(
        namespace=config.deployment.namespace,
        etcd_endpoint=connect_address(config.etcd.host, config.etcd.port),
        lease_s=config.etcd.lease_s,
        nats_url=f"nats://{connect_address(config.nats.host, config.nats.port)}",
        nats_token_file=NATS_TOKEN_FILE,
        rpc_secret_file=RPC_SECRET_FILE,
        etcd_join_file="" if is_loopback(config.etcd.host) else JOIN_FILE,
    )


def etcd_program(config: Config) -> Program:
    etcd = config.etcd
    plain = is_loopback(etcd.host)
    scheme = "http" if plain else "https"
    # There is one etcd, without peers: the peer port stays where no other machine reaches it.
    peers = f"http://127.0.0.1:{etcd.peer_port}"
    trust = [
        f"--cert-file={ETCD_SERVER_FILE}",
        f"--key-file={ETCD_SERVER_FILE}",
        f"--trusted-ca-file={AUTHORITY_FILE}",
        "--client-cert-auth",
    ]
    command = [
        "results/bin/etcd",
        "--name=serving",
        "--data-dir=run/etcd",
        f"--listen-client-urls={scheme}://{_bracketed(etcd.host)}:{etcd.port}",
        f"--advertise-client-urls={scheme}://{connect_address(etcd.host, etcd.port)}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=serving={peers}",
        *([] if plain else trust),
        # Every lease renewal and every change of membership leaves revisions behind.
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-level=warn",
    ]
    ports = {"etcd.port": etcd.port, **({"etcd.peer_port": etcd.peer_port} if plain else {})}
    return _program("etcd", command, "", etcd.host, ports, config)


def nats_program(config: Config) -> Program:
    settings = (
        "server_name: serving\n"
        f"listen: {json.dumps(f'{_bracketed(config.nats.host)}:{config.nats.port}')}\n"
        f'authorization {{ token: "{NATS_TOKEN}" }}\n'
    )
    command = ["results/bin/nats-server", "--config", "run/nats.conf"]
    ports = {"nats.port": config.nats.port}
    return _program("nats", command, settings, config.nats.host, ports, config)


def _program(
    name: str, command: list[str], settings: str, host: str, ports: dict[str, int], config: Config
) -> Program:
    return Program(
        name=name,
        command=command,
        fingerprint=program_fingerprint([command, settings]),
        host=host,
        ports=ports,
        settings=settings,
        settings_file=f"run/{name}.conf" if settings else "",
        engine="",
        start_s=config.deployment.start_s,
        stop_s=config.deployment.stop_s,
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
