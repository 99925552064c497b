"""Machines made of network namespaces, each with an address of its own on one bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from missing_tools import IPROUTE2, skip_without

NETWORK = "10.213.8"
OUTSIDE = f"{NETWORK}.254"
"""Where the test itself is: the clients' machine."""
LINK = "net0"


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ip", *arguments], check=check, capture_output=True, text=True, timeout=20
    )


def require_namespaces() -> None:
    """Skips where this machine cannot make any."""
    skip_without(IPROUTE2)
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    probe = f"probe{os.getpid()}"
    made = ip("netns", "add", probe, check=False)
    ip("netns", "del", probe, check=False)
    if made.returncode != 0:
        pytest.skip(f"this kernel gives us no network namespaces: {made.stderr.strip()}")


class Machine:
    """One namespace, reached by the others at `address`."""

    def __init__(self, number: int) -> None:
        self.namespace = f"node{os.getpid()}x{number}"
        self.address = f"{NETWORK}.{number}"
        self._outer = f"n{os.getpid() % 100000}x{number}"

    def connect(self, bridge: str) -> None:
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        peer = ["peer", "name", LINK, "netns", self.namespace]
        ip("link", "add", self._outer, "type", "veth", *peer)
        ip("link", "set", self._outer, "master", bridge, "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", LINK)
        ip("-n", self.namespace, "link", "set", LINK, "up")

    def inside(self, *command: str) -> list[str]:
        """The command, as run on this machine."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def python(self, code: str, timeout_s: float = 60) -> str:
        """What a Python program prints there."""
        done = subprocess.run(
            self.inside(sys.executable, "-c", code),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cut(self) -> None:
        """Pull the plug: nothing comes in, nothing goes out, and no process is notified."""
        ip("link", "set", self._outer, "nomaster")

    def mend(self, bridge: str) -> None:
        ip("link", "set", self._outer, "master", bridge)

    def shape(self, *qdisc: str) -> bool:
        """Slow down, lose or delay what leaves (`netem loss 30%`); False when this kernel cannot."""
        command = ["tc", "qdisc", "replace", "dev", LINK, "root", *qdisc]
        if shutil.which("tc") is None:
            return False
        done = subprocess.run(self.inside(*command), capture_output=True, timeout=20)
        return done.returncode == 0

    def unshape(self) -> None:
        command = ["tc", "qdisc", "del", "dev", LINK, "root"]
        subprocess.run(self.inside(*command), capture_output=True, timeout=20)

    def received_bytes(self) -> int:
        counter = f"/sys/class/net/{LINK}/statistics/rx_bytes"
        # sysfs shows the namespace that mounted it, which `ip netns exec` does anew.
        done = subprocess.run(
            self.inside("cat", counter), capture_output=True, text=True, timeout=20, check=True
        )
        return int(done.stdout)

    def remove(self) -> None:
        ip("netns", "del", self.namespace, check=False)


class Cluster:
    """Machines on one bridge."""

    def __init__(self, machines: list[Machine], bridge: str) -> None:
        self.machines, self.bridge = machines, bridge


@contextlib.contextmanager
def machines(count: int) -> Iterator[Cluster]:
    """`count` machines on one bridge. They and their network are removed afterwards."""
    require_namespaces()
    bridge = f"br{os.getpid()}"
    made = [Machine(number) for number in range(1, count + 1)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{OUTSIDE}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for machine in made:
            machine.connect(bridge)
        yield Cluster(made, bridge)
    finally:
        for machine in made:
            machine.remove()
        ip("link", "del", bridge, check=False)


def copy_join_file(head: Path, node: Path) -> None:
    """What a person does with scp."""
    node.mkdir(parents=True, exist_ok=True)
    shutil.copy(head / "run" / "secrets" / "join.pem", node / "join.pem")
