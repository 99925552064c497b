"""Paths of this checkout that others put into a command or a file without quotes.

Snakemake starts scripts by a shell, with the path of its interpreter as it is. A checkout may lie
in a folder with spaces, quotes or a dollar sign in its name.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from serving.errors import OperatorError

_FORBIDDEN = {
    "{": "a brace",
    "}": "a brace",
    "\n": "a line break",
    " ;": "a semicolon after a space",
}


class ShellWord(str):
    """A path, which is one word when it is formatted into a command."""

    def __format__(self, specification: str) -> str:
        return format(shlex.quote(str(self)), specification)


def quote_interpreter() -> None:
    """From here on, commands that Snakemake formats name this Python correctly, whatever its path."""
    if shlex.quote(sys.executable) != sys.executable:
        sys.executable = ShellWord(sys.executable)


def require_usable_paths(checkout: Path, deployment: Path) -> None:
    """Raises OperatorError for a folder name that cannot be written into every file it must go into.

    Braces are wildcards to Snakemake; supervisord's files have no word for the others.
    """
    for what, path in (("checkout", checkout), ("deployment", deployment), ("Python", sys.prefix)):
        found = [name for text, name in _FORBIDDEN.items() if text in str(path)]
        if '"' in str(path) and "'" in str(path):
            found.append("both kinds of quotes")
        if found:
            raise OperatorError(
                f"the path of the {what} has {found[0]} in it: {str(path)!r}",
                remedy="move it into a folder without that in its name",
            )
