"""The commands that README.md and docs/ show, for tests to run as they are written."""

from __future__ import annotations

import re
import shlex

from integration.deployment import REPO

HEAD_ADDRESS = "10.0.0.1"
"""The address of the head in the pages."""


def block(name: str) -> str:
    """The fenced commands that follow `<!-- name -->`, on whichever page that is."""
    pattern = re.compile(rf"<!-- {name} -->\n```bash\n(.*?)```", re.S)
    pages = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    found = [match for page in pages for match in pattern.findall(page.read_text("utf-8"))]
    assert len(found) == 1, f"{len(found)} blocks after <!-- {name} -->"
    return str(found[0])


def snakemake_arguments(name: str, head: str) -> list[list[str]]:
    """The arguments of each command in a block of `snakemake` commands. `head` replaces the address
    of the head, and `--cores all` is left out, because tests add it."""
    commands = []
    for line in block(name).replace(HEAD_ADDRESS, head).strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "snakemake", line
        if "--cores" in arguments:
            at = arguments.index("--cores")
            del arguments[at : at + 2]
        commands.append(arguments)
    return commands
