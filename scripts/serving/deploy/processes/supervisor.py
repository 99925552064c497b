"""One supervisord per deployment, and its programs.

Everything is relative to the working directory, which is the deployment's. This module knows
processes and their configuration files. It does not know what the programs do or when they are
ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec.structs import replace

from serving.deploy.containers.removal import remove_container
from serving.deploy.healing.kept_programs import keep_file, let_go
from serving.deploy.processes import tags
from serving.deploy.processes.launchers import LOGS, RUN, WATCHER, ProcessInfo, ProgramSpec
from serving.deploy.processes.supervisor_conf import (
    CONF,
    LOG,
    PROGRAMS,
    SOCKET,
    is_expressible,
    program_conf,
    supervisord_conf,
)
from serving.deploy.processes.supervisord_rpc import SupervisordRpc
from serving.deploy.processes.tags import deployed_processes, end_processes, is_alive, tag_of_pid
from serving.errors import OperatorError

__all__ = ["LOGS", "RUN", "ProcessInfo", "ProgramSpec", "Supervisor"]

LOCK = RUN / "supervisor.lock"
ANSWER_S = 10.0
END_S = 10.0
BOOT_S = 20.0
KILL_GRACE_S = 5.0
ORPHAN_GRACE_S = 10.0
_POLL_S = 0.05
_LIVE = {"STARTING", "RUNNING", "BACKOFF", "STOPPING"}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Needed to download a model; nothing that runs afterwards may see them."""


class Supervisor:
    """A Launcher: the supervisord of the deployment in the working directory.

    It counts as not answering when a call takes longer than `answer_s`.
    """

    poll_s = 0.1

    def __init__(self, *, answer_s: float = ANSWER_S) -> None:
        self.deployment = str(RUN.resolve())
        self._rpc = SupervisordRpc(SOCKET, answer_s)

    # --- looking -------------------------------------------------------------------------------

    def answers(self) -> bool:
        """Whether a supervisord of this deployment is there."""
        try:
            return bool(self._rpc.call("getIdentification") == "serving")
        except OSError:
            return False

    def state(self) -> dict[str, ProcessInfo]:
        """Every program supervisord knows, without the watcher; empty when it does not answer."""
        return {name: info for name, info in self._state().items() if name != WATCHER}

    def watcher(self) -> ProcessInfo | None:
        """The program that keeps the others running; None when it was not started."""
        return self._state().get(WATCHER)

    def _state(self) -> dict[str, ProcessInfo]:
        try:
            rows = self._rpc.call("getAllProcessInfo")
        except OSError:
            return {}
        return {row["name"]: _info(row) for row in rows}

    def orphans(self) -> list[tuple[psutil.Process, tags.Tag]]:
        """Processes of this deployment that its supervisord does not look after.

        A process in a container is not a child of its client, but it has the same launch id.
        """
        keeper = self._rpc.call("getPID") if self.answers() else None
        kept = set()
        if keeper is not None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(keeper)
                kept = {keeper, *(child.pid for child in root.children(recursive=True))}
        found = list(deployed_processes(RUN))
        launches = {tag.launch_id for p, tag in found if p.pid in kept} - {""}
        return [(p, t) for p, t in found if p.pid not in kept and t.launch_id not in launches]

    def pending_reason(self, name: str) -> str:
        """Programs on this machine never wait for resources."""
        return ""

    # --- changing ------------------------------------------------------------------------------

    def ensure(self) -> None:
        """Have a supervisord run. Everything that an earlier one left behind is stopped first."""
        with self._lock():
            if self.answers():
                return
            self._stop_orphans()
            for stale in (SOCKET, RUN / "supervisord.pid"):
                stale.unlink(missing_ok=True)
            for pattern in ("*.conf", "*.keep"):
                for file in PROGRAMS.glob(pattern):
                    file.unlink()
            CONF.write_text(supervisord_conf())
            self._boot()

    def start(self, spec: ProgramSpec) -> ProcessInfo:
        """Start a program in place of any of that name. Returns at once, not when it is ready.

        Raises OperatorError when it cannot be executed; then nothing of it stays behind.
        """
        self.stop([spec.name])
        spec = self.with_environment(spec)
        with self._lock():
            return self._launch(spec)

    def restart(self, spec: ProgramSpec) -> ProcessInfo | None:
        """Start a program again that has ended by itself, as a new launch.

        None when it runs, or when somebody stops it meanwhile. Raises OperatorError as `start`
        does. `spec` must be what `with_environment` returned.
        """
        end_processes(self._tagged([spec.name]), grace_s=KILL_GRACE_S)  # of a group without leader
        self._remove_leftovers([spec.name])
        with self._lock():
            info = self._state().get(spec.name)
            if not keep_file(spec.name).exists() or (info and info.state in _LIVE):
                return None
            self._tolerant("removeProcessGroup", spec.name)
            return self._launch(spec)

    def with_environment(self, spec: ProgramSpec) -> ProgramSpec:
        """`spec` with the variables that a person exported since supervisord began."""
        return replace(spec, env={**self._environment_since_boot(), **spec.env})

    def _launch(self, spec: ProgramSpec) -> ProcessInfo:
        """Called under the lock, when supervisord does not have the program."""
        if spec.removal:
            remove_container(spec.removal)  # left by a deployment whose `run` folder was deleted
            self._removal(spec.name).write_text(json.dumps(list(spec.removal)))
        launch_id = secrets.token_hex(16)
        conf = PROGRAMS / f"{spec.name}.conf"
        temporary = conf.with_suffix(".tmp")
        temporary.write_text(program_conf(spec, self.deployment, launch_id))
        temporary.replace(conf)
        try:
            self._rpc.call("reloadConfig")
            self._rpc.call("addProcessGroup", spec.name)
            self._rpc.call("startProcess", spec.name, False)
        except xmlrpc.client.Fault as fault:
            self._tolerant("removeProcessGroup", spec.name)
            conf.unlink()
            raise OperatorError(
                f"{spec.name} cannot be started: {fault.faultString}",
                remedy=f"check that {spec.command[0]} exists and can be executed; see {LOG}",
            ) from None
        info = self._state()[spec.name]
        # The process may not have executed the program yet, so its environment is no evidence.
        return replace(info, fingerprint=spec.fingerprint, engine=spec.engine, launch_id=launch_id)

    def stop(self, names: Sequence[str]) -> None:
        """Stop these programs at the same time, whole process groups, and forget them.

        Each has its own `stop_s` to drain; what still lives after that is killed. Unknown names are
        ignored. Raises OperatorError for a container that cannot be removed.
        """
        if not RUN.is_dir():
            return
        with self._lock():  # from here on, the watcher starts none of them
            let_go(names)
        known = self._state()
        mine = [name for name in names if name in known]
        for name in mine:
            if known[name].state in _LIVE:
                self._tolerant("stopProcess", name, False)
        self._wait_stopped(mine)
        # Whatever left its process group, or outlived its leader, is found by its tag.
        end_processes(self._tagged(names), grace_s=KILL_GRACE_S)
        with self._lock():
            for name in mine:
                self._tolerant("removeProcessGroup", name)
            for name in names:
                (PROGRAMS / f"{name}.conf").unlink(missing_ok=True)
        self._remove_leftovers(names)

    def shutdown(self) -> None:
        """End supervisord and everything that is left of the deployment."""
        if self.answers():
            keeper = psutil.Process(self._rpc.call("getPID"))
            self._tolerant("shutdown")
            ends = time.monotonic() + END_S
            while is_alive(keeper) and time.monotonic() < ends:
                time.sleep(_POLL_S)
        self._stop_orphans()
        self._remove_leftovers([path.stem for path in PROGRAMS.glob("*.removal")])

    # --- inside --------------------------------------------------------------------------------

    def _tagged(self, names: Sequence[str]) -> list[psutil.Process]:
        return [p for p, tag in deployed_processes(RUN) if tag.program and tag.program in names]

    def _stop_orphans(self) -> None:
        """Programs that serve requests first, so that they can drain; a stray supervisord last."""
        orphans = list(deployed_processes(RUN))
        control = {"nats", "etcd", ""}
        end_processes([p for p, tag in orphans if tag.program not in control], ORPHAN_GRACE_S)
        end_processes([p for p, tag in orphans if tag.program in control], ORPHAN_GRACE_S)

    def _removal(self, name: str) -> Path:
        """The file with the command that removes a program's container: the config may change."""
        return PROGRAMS / f"{name}.removal"

    def _remove_leftovers(self, names: Sequence[str]) -> None:
        for path in map(self._removal, names):
            if path.exists():
                remove_container(json.loads(path.read_text()))
                path.unlink(missing_ok=True)

    def _environment_since_boot(self) -> dict[str, str]:
        """Variables that are set here and were unset, or different, when supervisord began.

        A program inherits from supervisord, which an earlier command may have started. Variables
        that a person exports before this command must reach the program, too.
        """
        try:
            booted = psutil.Process(self._rpc.call("getPID")).environ()
        except (OSError, psutil.Error):
            return {}
        now = {k: v for k, v in _environment().items() if booted.get(k) != v}
        return {key: value for key, value in now.items() if is_expressible(key, value)}

    def _boot(self) -> None:
        environment = _environment()
        environment[tags.DEPLOYMENT] = self.deployment
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(CONF)]
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BOOT_S,
            check=False,
        )
        ends = time.monotonic() + BOOT_S
        while done.returncode == 0 and time.monotonic() < ends:
            if self.answers():
                return
            time.sleep(_POLL_S)
        output = (done.stderr or done.stdout).strip()[-500:] or "it does not answer"
        raise OperatorError(f"supervisord cannot be started: {output}", remedy=f"see {LOG}")

    def _wait_stopped(self, names: Sequence[str]) -> None:
        """For as long as supervisord gives these programs to stop, and a grace."""
        promised: list[float] = []
        with contextlib.suppress(OSError):
            rows = self._rpc.call("getAllConfigInfo") if names else []
            promised = [row["stopwaitsecs"] for row in rows if row["name"] in names]
        ends = time.monotonic() + max(promised, default=0.0) + KILL_GRACE_S
        while time.monotonic() < ends:
            state = self._state()
            if not any(name in state and state[name].state in _LIVE for name in names):
                return
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Jobs run side by side; one at a time creates the supervisor or changes its programs."""
        RUN.mkdir(mode=0o700, exist_ok=True)
        RUN.chmod(0o700)
        PROGRAMS.mkdir(exist_ok=True)
        LOGS.mkdir(exist_ok=True)
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _tolerant(self, method: str, *arguments: Any) -> None:
        """For calls that are refused only when their effect is there already."""
        with contextlib.suppress(OSError, xmlrpc.client.Fault):
            self._rpc.call(method, *arguments)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in _SECRETS}


def _info(row: Mapping[str, Any]) -> ProcessInfo:
    tag = tag_of_pid(row["pid"]) if row["pid"] else None
    return ProcessInfo(
        name=row["name"],
        state=row["statename"],
        pid=row["pid"],
        started=float(row["start"]),
        exit_status=row["exitstatus"],
        spawn_error=row["spawnerr"],
        fingerprint=tag.fingerprint if tag else "",
        engine=tag.engine if tag else "",
        launch_id=tag.launch_id if tag else "",
    )
