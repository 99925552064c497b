"""The commands that the README shows, for tests to run as they are written."""

from __future__ import annotations

import re
import shlex

from integration.deployment import REPO

HEAD_ADDRESS = "10.0.0.1"
"""What the README calls the head."""


def block(name: str) -> str:
    """The fenced commands that follow `<!-- name -->`."""
    match = re.search(
        rf"<!-- {name} -->\n```bash\n(.*?)```", (REPO / "README.md").read_text(), re.S
    )
    assert match, f"no block after <!-- {name} -->"
    return match.group(1)


def snakemake_arguments(name: str, head: str) -> list[list[str]]:
    """Of each command of a block of `snakemake` commands, with another address of the head and
    without `--cores all`, which tests add."""
    commands = []
    for line in block(name).replace(HEAD_ADDRESS, head).strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "snakemake", line
        if "--cores" in arguments:
            at = arguments.index("--cores")
            del arguments[at : at + 2]
        commands.append(arguments)
    return commands
