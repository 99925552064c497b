"""Ports that the deployment will listen on."""

import socket
from pathlib import Path

from serving.config import parse
from serving.deploy.checks.ports import judge_ports
from unit.deploy.checks.finding_names import wrong


def test_port_held_by_a_stranger_is_found_by_its_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = parse({"frontend": {"port": port}})
        found = wrong(judge_ports(config, tmp_path / "run"))
    assert found["frontend.port"].blocks
    assert str(port) in found["frontend.port"].detail
    assert "frontend.port" in found["frontend.port"].remedy
