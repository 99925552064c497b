"""How much memory this process may still take: the machine's, or less under a cgroup's limit.

A container, a Slurm job or a systemd unit may allow far less than the machine has.
"""

from __future__ import annotations

from pathlib import Path

import psutil
from msgspec import Struct

_ROOT = Path("/")


class HostMemory(Struct, frozen=True):
    """Bytes. `available` counts what the kernel would take back from its caches."""

    total: int
    available: int


def host_memory(root: Path = _ROOT) -> HostMemory:
    """The least of the machine's memory and of every cgroup above this process.

    `root` is where `proc` and `sys` are mounted.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _cgroup_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Limit and usage of each cgroup with a limit that this process is in, of version 2 and 1.

    Inside a container the path that the kernel reports may not exist; the mount then shows the
    container's own cgroup at its top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            for cgroup in (folder, *folder.parents):
                if not cgroup.is_relative_to(mount):
                    break
                if limit := _limit_of(cgroup, *names):
                    found.append(limit)
    return found


def _limit_of(cgroup: Path, maximum: str, current: str, cache: str) -> tuple[int, int] | None:
    """None where there is no limit. Pages of files that nobody uses count as free."""
    try:
        limit = int((cgroup / maximum).read_text())  # the word "max" is no limit
        used = int((cgroup / current).read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit, max(0, used - int(stat.get(cache, 0)))
