"""A cgroup's limit counts where it is lower than the machine's memory."""

from pathlib import Path

import pytest
from serving.host_memory import host_memory

MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def place(root: Path, line: str) -> None:
    write(root / "proc" / "self", cgroup=f"{line}\n")


def version_2(folder: Path, limit: str, used: int, cache: int) -> None:
    write(
        folder,
        memory__max=f"{limit}\n",
        memory__current=f"{used}\n",
        memory__stat=f"anon 5\ninactive_file {cache}\n",
    )


def test_limit_of_version_2_leaves_out_what_the_kernel_takes_back(tmp_path: Path) -> None:
    place(tmp_path, "0::/job")
    version_2(tmp_path / "sys/fs/cgroup/job", str(100 * MIB), 70 * MIB, 20 * MIB)
    memory = host_memory(tmp_path)
    assert memory.total == 100 * MIB
    assert memory.available == 50 * MIB


def test_limit_of_a_cgroup_above_counts_too(tmp_path: Path) -> None:
    place(tmp_path, "0::/slice/job")
    version_2(tmp_path / "sys/fs/cgroup/slice", str(80 * MIB), 60 * MIB, 0)
    version_2(tmp_path / "sys/fs/cgroup/slice/job", "max", 60 * MIB, 0)
    assert host_memory(tmp_path).available == 20 * MIB


def test_limit_of_version_1(tmp_path: Path) -> None:
    place(tmp_path, "4:memory:/job")
    write(
        tmp_path / "sys/fs/cgroup/memory/job",
        memory__limit_in_bytes=str(64 * MIB),
        memory__usage_in_bytes=str(32 * MIB),
        memory__stat=f"cache 1\ntotal_inactive_file {8 * MIB}\n",
    )
    assert host_memory(tmp_path).available == 40 * MIB


def test_container_that_does_not_see_its_own_path(tmp_path: Path) -> None:
    place(tmp_path, "4:memory:/docker/0123")
    write(
        tmp_path / "sys/fs/cgroup/memory",
        memory__limit_in_bytes=str(64 * MIB),
        memory__usage_in_bytes=str(60 * MIB),
        memory__stat="total_inactive_file 0\n",
    )
    assert host_memory(tmp_path).available == 4 * MIB


@pytest.mark.parametrize("line", ["0::/job", "4:memory:/job", "3:cpuset:/job"])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, line: str) -> None:
    place(tmp_path, line)
    version_2(tmp_path / "sys/fs/cgroup/job", "max", MIB, 0)
    write(
        tmp_path / "sys/fs/cgroup/memory/job",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="1",
        memory__stat="total_inactive_file 0\n",
    )
    memory = host_memory(tmp_path)
    assert memory.total >= memory.available > 64 * MIB
    assert memory.total == host_memory(tmp_path / "nowhere").total
