"""A cgroup's quota of CPUs counts where it is lower than what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serving.host_cpus import host_cpus


@pytest.mark.parametrize(
    ("line", "files", "cpus"),
    [
        ("0::/job", {"job/cpu.max": "150000 100000"}, 2),
        ("0::/job", {"job/cpu.max": "max 100000"}, 16),
        ("0::/slice/job", {"slice/cpu.max": "100000 100000", "slice/job/cpu.max": "max 100000"}, 1),
        ("0::/gone/in/a/container", {"cpu.max": "50000 100000"}, 1),
        (
            "4:cpu,cpuacct:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("5:memory:/job", {}, 16),
    ],
)
def test_quota_of_any_cgroup_above_counts(
    line: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert host_cpus(tmp_path) == cpus
