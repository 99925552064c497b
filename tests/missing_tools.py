"""Tools that some tests need and that the README's test command cannot install.

A test asks for its tool here and is skipped without it. The end of the test run then says in one
line what to install to run every test.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Tool:
    """What a person calls it, the programs that it consists of, and Debian's packages of them."""

    name: str
    programs: Sequence[str]
    packages: str


IPROUTE2 = Tool("iproute2", ["ip"], "iproute2")
PODMAN = Tool("podman", ["podman"], "podman runc")
SLURM = Tool(
    "Slurm",
    ["munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel"],
    "slurm-wlm slurm-client munge",
)

_INSTALL = re.compile(
    r"apt(?:-get)? install ((?:[a-z0-9][a-z0-9.+-]* ?)+)|(pip install [a-z0-9-]+)"
)


def skip_without(tool: Tool, path: str | None = None) -> None:
    """Skips the test when a program of `tool` is missing from `path` (default: `$PATH`)."""
    missing = [name for name in tool.programs if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"{tool.name}: {', '.join(missing)} not found; apt-get install {tool.packages}")


def install_commands(reasons: Iterable[str]) -> str:
    """One line with every `apt-get install` and `pip install` in the reasons; "" for none."""
    packages: set[str] = set()
    wheels: set[str] = set()
    for reason in reasons:
        for debian, pip in _INSTALL.findall(reason):
            packages |= set(debian.split())
            wheels |= {pip} - {""}
    apt = [f"apt-get install {' '.join(sorted(packages))}"] if packages else []
    return "; ".join([*apt, *sorted(wheels)])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Below the list of skipped tests: what to install to run them."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    if commands := install_commands(str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"To run the skipped tests as well: {commands}", yellow=True)
