"""How many CPUs this process may use: those that it may run on, or less under a cgroup's quota.

A container with `--cpus 2` still sees all CPUs of the machine, and threads beyond the quota only
wait for each other.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")


def host_cpus(root: Path = _ROOT) -> int:
    """At least 1. `root` is where `proc` and `sys` are mounted."""
    allowed = float(len(os.sched_getaffinity(0)))
    return max(1, math.ceil(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    """CPUs that each cgroup with a quota may use, of version 2 and 1, from this process's upwards.

    In a container the path may not exist: the mount then shows the container's own at its top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = [controllers, "cpu", "cpu,cpuacct"] if controllers else ["", "unified"]
        for mount in {root / "sys/fs/cgroup" / name for name in names}:
            folder = mount / path.lstrip("/")
            for cgroup in (folder, *folder.parents):
                if not cgroup.is_relative_to(mount):
                    break
                found += _quota(cgroup)
    return found


def _quota(cgroup: Path) -> list[float]:
    """Empty where there is none."""
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = map(int, (cgroup / "cpu.max").read_text().split())  # "max": no quota
        else:
            quota = int((cgroup / "cpu.cfs_quota_us").read_text())
            period = int((cgroup / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return []
    return [quota / period] if quota > 0 and period > 0 else []
