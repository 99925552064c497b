"""What supervisord is told: its own configuration and that of one program.

Paths are relative to the working directory, which is the deployment's: a unix socket's path must
be short, and a deployment may lie deep.
"""

from __future__ import annotations

import math
import resource
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from serving.deploy.processes import processes
from serving.errors import OperatorError

RUN = Path("run")
LOGS = Path("logs")
PROGRAMS = RUN / "programs"
SOCKET = RUN / "supervisor.sock"
CONF = RUN / "supervisord.conf"
LOG = LOGS / "supervisord.log"

_LOG_BYTES = 20 * 1024 * 1024
_LOG_BACKUPS = 3
_OPEN_FILES = 8192


class ProgramSpec(Struct, frozen=True, kw_only=True):
    """What to run. Durations in seconds; `env` adds to the supervisor's own environment.

    `owns_log`: the program writes its log by itself and not through supervisord. A Go program
    dies of its next log line when the supervisor that read it has died; Python shrugs.
    `removal` is a command that removes what may outlive the process: its container.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    fingerprint: str
    stop_s: float
    engine: str = ""
    owns_log: bool = False
    removal: Sequence[str] = ()


def supervisord_conf() -> str:
    """One that answers on `SOCKET` only, and to this user only."""
    # supervisord makes paths absolute, and an absolute socket path may be too long to bind.
    here = Path("/proc/self/cwd")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    return f"""\
[unix_http_server]
file = {here / SOCKET}
chmod = 0700

[supervisord]
identifier = serving
logfile = {LOG}
logfile_maxbytes = {_LOG_BYTES}
logfile_backups = 1
pidfile = {RUN / "supervisord.pid"}
umask = 077
minfds = {files}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[include]
files = programs/*.conf
"""


def program_conf(spec: ProgramSpec, deployment: str, launch_id: str) -> str:
    """Raises OperatorError for what this format cannot express."""
    log = LOGS / f"{spec.name}.log"
    command, logfile = list(spec.command), str(log)
    if spec.owns_log:
        command = ["/bin/sh", "-c", f'exec "$0" "$@" >>{shlex.quote(str(log))} 2>&1', *command]
        logfile = "NONE"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
    tags = {
        processes.DEPLOYMENT: deployment,
        processes.PROGRAM: spec.name,
        processes.FINGERPRINT: spec.fingerprint,
        processes.ENGINE: spec.engine,
        processes.LAUNCH: launch_id,
    }
    environment = ",".join(f"{k}={_quoted(k, v)}" for k, v in {**spec.env, **tags}.items())
    return f"""\
[program:{spec.name}]
command = {_plain("command", shlex.join(command))}
environment = {environment}
autostart = false
autorestart = false
startretries = 0
startsecs = 0
stopsignal = TERM
stopasgroup = true
killasgroup = true
stopwaitsecs = {max(1, math.ceil(spec.stop_s))}
redirect_stderr = true
stdout_logfile = {logfile}
stdout_logfile_maxbytes = {_LOG_BYTES}
stdout_logfile_backups = {_LOG_BACKUPS}
"""


def expressible(key: str, value: str) -> bool:
    """Whether a variable can be given to a program: exported shell functions cannot."""
    try:
        _quoted(key, value)
    except OperatorError:
        return False
    return key.isidentifier()


def _quoted(key: str, value: str) -> str:
    """supervisord takes values between quotes, and strips all quotes from both ends of them."""
    quote = "'" if '"' in value else '"'
    if quote in value or value != value.strip("'\""):
        raise OperatorError(
            f"{key} has quotes where supervisord cannot be told of them",
            remedy=f"change {key}, or the path in it: {value!r}",
        )
    return quote + _plain(key, value) + quote


def _plain(key: str, value: str) -> str:
    """supervisord expands `%` and ends a value at a line's end and at ` ;`."""
    if "\n" in value or " ;" in value:
        raise OperatorError(
            f"{key} has a line break or a semicolon in it, which supervisord cannot be told",
            remedy=f"change {key}, or the path in it: {value!r}",
        )
    return value.replace("%", "%%")
