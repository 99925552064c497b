"""Own programs speak to each other directly, whatever proxy the environment names."""

from __future__ import annotations

import socket

import pytest
from serving.discovery.etcd import FAILURES, EtcdClient


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy"])
async def test_etcd_is_never_asked_for_through_a_proxy(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as proxy, socket.socket() as unused:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        unused.bind(("127.0.0.1", 0))  # nobody listens, so a direct attempt is refused at once
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        async with EtcdClient.connect(f"127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(FAILURES):
                await client.get("key")
        with pytest.raises(BlockingIOError):
            proxy.accept()
