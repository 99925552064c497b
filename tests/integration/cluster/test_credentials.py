"""Off loopback, a client without credentials gets nothing from any port and breaks nothing."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import httpx
import psutil
import pytest
from integration.cluster.network import answer_to, outside_address
from integration.deployment import Deployment, running
from integration.tiny_model import save_tiny_model

AUTHORITY = "api_authority.pem"
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def listening_on(deployment: Deployment) -> set[tuple[str, int]]:
    """Every TCP address that a process of the deployment listens on."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in deployment.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_clients_without_credentials_get_nothing_from_any_port(tmp_path: Path) -> None:
    host = outside_address()
    deployment = Deployment(
        tmp_path / "outside",
        str(save_tiny_model(tmp_path / "tiny")),
        frontend={"host": f"{host}/32", "tls": True},
        nats={"host": host},
        etcd={"host": host},
        network={"rpc_host": host, "kv_host": host},
    )
    url = f"https://{host}:{deployment.config['frontend']['port']}"
    with running(deployment, "serve_disagg"):
        secrets = deployment.directory / "run" / "secrets"
        assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o600}
        key = (secrets / "api_keys").read_text().strip()
        bearer = {"authorization": f"Bearer {key}"}
        pids = deployment.pids()
        listeners = listening_on(deployment)
        outside = {address for address in listeners if address[0] == host}
        # The API, NATS, etcd, and each worker's RPC; control of KV where blocks are handed out.
        assert len(outside) >= 6
        assert not {ip for ip, _ in listeners} & {"0.0.0.0", "::"}

        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        client = httpx.Client(verify=ssl.create_default_context(cafile=secrets / AUTHORITY))
        assert client.get(f"{url}/health").status_code == 200
        for path in ("/ready", "/metrics", "/v1/models", "/nothing"):
            assert client.get(f"{url}{path}").status_code == 401
        body = {"model": "tiny", "prompt": "One two", "max_tokens": 2}
        assert client.post(f"{url}/v1/completions", json=body).status_code == 401
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"https://{host}:{deployment.config['etcd']['port']}/health", verify=False)
        nats = answer_to((host, deployment.config["nats"]["port"]), b"CONNECT {}\r\nPING\r\n")
        assert b"Authorization Violation" in nats
        assert b"PONG" not in nats
        for address in outside:
            for garbage in (os.urandom(4096), b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4):
                assert key.encode() not in answer_to(address, garbage)

        assert deployment.pids() == pids
        answered = client.post(f"{url}/v1/completions", json=body, headers=bearer, timeout=60)
        client.close()
        assert answered.status_code == 200
        assert "not routed to" not in deployment.snakemake("status").stdout
        assert "passed" in deployment.snakemake("smoke_test").stdout
