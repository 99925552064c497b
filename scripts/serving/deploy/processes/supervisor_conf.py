"""supervisord's configuration files: its own, and one for each program.

Paths are relative to the working directory, which is the deployment's. The path of a UNIX socket
must be short, and a deployment may lie deep.
"""

from __future__ import annotations

import math
import resource
import shlex
from pathlib import Path

from serving.deploy.processes import tags
from serving.deploy.processes.launchers import LOGS, RUN, ProgramSpec
from serving.errors import OperatorError

PROGRAMS = RUN / "programs"
SOCKET = RUN / "supervisor.sock"
CONF = RUN / "supervisord.conf"
LOG = LOGS / "supervisord.log"

_LOG_BYTES = 20 * 1024 * 1024
_LOG_BACKUPS = 3
_LEFT_ALONE = "autorestart = false\nstartretries = 0\nstartsecs = 0"
_RESTARTED = "autorestart = true\nstartretries = 100\nstartsecs = 1"
_OPEN_FILES = 8192


def supervisord_conf() -> str:
    """The configuration of a supervisord that answers only this user, on `SOCKET`."""
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
    """The configuration of one program. Raises OperatorError for a value that it cannot express."""
    log = LOGS / f"{spec.name}.log"
    command, logfile = list(spec.command), str(log)
    if spec.owns_log:
        command = ["/bin/sh", "-c", f'exec "$0" "$@" >>{shlex.quote(str(log))} 2>&1', *command]
        logfile = "NONE"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
    environment = {
        **spec.env,
        tags.DEPLOYMENT: deployment,
        tags.PROGRAM: spec.name,
        tags.FINGERPRINT: spec.fingerprint,
        tags.ENGINE: spec.engine,
        tags.LAUNCH: launch_id,
    }
    settings = ",".join(f"{key}={_quoted(key, value)}" for key, value in environment.items())
    return f"""\
[program:{spec.name}]
command = {_escaped("command", shlex.join(command))}
environment = {settings}
autostart = false
{_RESTARTED if spec.by_supervisord else _LEFT_ALONE}
stopsignal = TERM
stopasgroup = true
killasgroup = true
stopwaitsecs = {max(1, math.ceil(spec.stop_s))}
redirect_stderr = true
stdout_logfile = {logfile}
stdout_logfile_maxbytes = {_LOG_BYTES}
stdout_logfile_backups = {_LOG_BACKUPS}
"""


def is_expressible(key: str, value: str) -> bool:
    """Whether a variable can be passed to a program. Exported shell functions cannot."""
    try:
        _quoted(key, value)
    except OperatorError:
        return False
    return key.isidentifier()


def _quoted(key: str, value: str) -> str:
    """supervisord reads a value between quotes, and strips every quote from both of its ends."""
    quote = "'" if '"' in value else '"'
    if quote in value or value != value.strip("'\""):
        raise OperatorError(
            f"{key} has quotes that supervisord's configuration cannot express",
            remedy=f"change {key}, or the path in it: {value!r}",
        )
    return quote + _escaped(key, value) + quote


def _escaped(key: str, value: str) -> str:
    """supervisord expands `%`, and ends a value at a line break and at ` ;`."""
    if "\n" in value or " ;" in value:
        raise OperatorError(
            f"{key} has a line break or a semicolon, which supervisord's configuration cannot express",
            remedy=f"change {key}, or the path in it: {value!r}",
        )
    return value.replace("%", "%%")
