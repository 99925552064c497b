"""Remove a container whose client was killed: it goes on without the client."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from serving.errors import OperatorError

REMOVE_S = 60.0


def remove_container(command: Sequence[str]) -> None:
    """Run a removal command; nothing to remove is fine. Raises OperatorError when it fails."""
    if not command:
        return
    output = ""
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
            return  # the runtime was uninstalled, and the processes have ended already
        except (OSError, subprocess.TimeoutExpired) as exc:
            output = str(exc)
            break
        output = " ".join((done.stderr or done.stdout).split())
        if done.returncode == 0 or "no such container" in output.lower():
            return
    raise OperatorError(
        f"the container {command[-1]} cannot be removed: {output[-300:]}",
        remedy=f"remove it by hand: `{' '.join(command)}`",
    )
