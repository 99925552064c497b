"""Remove what a killed client leaves: its container goes on without it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from serving.errors import OperatorError

REMOVE_S = 60.0


def remove(command: Sequence[str]) -> None:
    """Run a removal; having nothing to remove is fine. Raises OperatorError when it refuses."""
    if not command:
        return
    said = ""
    for _ in range(2):  # the runtime may be removing it at this moment, and then refuses once
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=REMOVE_S,
                check=False,
            )
        except FileNotFoundError:
            return  # with the runtime gone there is nobody to ask; processes were ended already
        except (OSError, subprocess.TimeoutExpired) as exc:
            said = str(exc)
            break
        said = " ".join((done.stderr or done.stdout).split())
        if done.returncode == 0 or "no such container" in said.lower():
            return
    raise OperatorError(
        f"the container {command[-1]} cannot be removed: {said[-300:]}",
        remedy=f"remove it by hand: `{' '.join(command)}`",
    )
