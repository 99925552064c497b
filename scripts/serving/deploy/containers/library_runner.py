"""Run programs of the engine's library where workers will run: on this host, or in their image.

A build asks the library for its version, and may let it compile for minutes. Each line of output
is passed on as it comes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.config import Config
from serving.config.resolve import topology_roles
from serving.deploy.containers.removal import remove_container
from serving.deploy.containers.run_command import runs_in_container
from serving.deploy.containers.worker_command import MODELS, contain
from serving.deploy.planning.gpu_assignment import visible_order
from serving.deploy.planning.source_digest import SCRIPTS
from serving.engine.trtllm.build.installed import PYTHON
from serving.errors import OperatorError
from serving.progress import Report

PROGRAM = "build-engine"


class LibraryRunner:
    """Implements `engine.trtllm.build.installed.RunProgram`.

    The programs see `gpus`, write to the folders `writable` and read from `readable`; in a
    container no other folders exist for them.
    """

    def __init__(
        self,
        config: Config,
        *,
        gpus: Sequence[int],
        writable: Sequence[Path],
        readable: Sequence[Path] = (),
    ) -> None:
        self._container = config.container
        self._inside = any(
            runs_in_container(config.container, role)
            for role in topology_roles(config.deployment.topology)
        )
        self._env = {
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPTS)),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": visible_order(gpus, []),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._writable, self._readable = writable, [MODELS, *readable]

    def __call__(
        self, argv: list[str], *, report: Report | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Raises OperatorError when the program cannot be started, or an earlier one not removed."""
        python = self._container.python if self._inside else sys.executable
        command = [python if part == PYTHON else part for part in argv]
        env, removal = dict(self._env), list[str]()
        if self._inside:
            contained = contain(
                self._container,
                command,
                name=PROGRAM,
                env=env,
                read_only=self._readable,
                writable=self._writable,
            )
            command, env, removal = contained.command, contained.env, contained.removal
            remove_container(removal)  # of a build whose client was killed: its name is taken
        lines = []
        try:
            with subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None, "it is a pipe"
                try:
                    for line in process.stdout:
                        lines.append(line)
                        if report is not None:
                            report(line.rstrip("\n"))
                except BaseException:
                    process.kill()
                    remove_container(removal)  # what runs inside goes on without its client
                    raise
        except OSError as exc:
            raise OperatorError(
                f"{command[0]} cannot be started: {exc.strerror}",
                remedy="install it, or set `container.runtime` and use the library's image",
            ) from exc
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines), "")
