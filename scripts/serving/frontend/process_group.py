"""Several frontend processes behind one port: starts them and replaces one that dies or is silent.

The parent owns a listening socket for each process slot and serves nothing itself. With
`SO_REUSEPORT`, the kernel spreads connections over the sockets. A socket outlives its process:
connections that arrive in between wait for the successor. Each slot also has a socket on loopback,
where the other processes read its metrics (`metrics/pages.py`). All slots share the memory of the
decision log (`decision_log.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack

import msgspec
from msgspec import Struct

from serving.config.process import BEAT_S, FrontendSettings, announce_ready, beating
from serving.errors import OperatorError
from serving.frontend import decision_log

log = logging.getLogger(__name__)

REPLACE_S = 1.0
"""Least time between two starts in a slot, so that a process that keeps dying spares the cores."""
BACKLOG = 2048
STARTED = b"started\n"
_PR_SET_PDEATHSIG = 1


class ProcessSlot(Struct, frozen=True):
    """One of the processes: its number, and the file descriptors that it inherits.

    `own_ports` are the loopback ports of all slots, by number. `parent` is a process id.
    """

    number: int
    listener: int
    own_listener: int
    own_ports: list[int]
    decision_log: int
    parent: int

    def sockets(self) -> list[socket.socket]:
        return [socket.socket(fileno=self.listener), socket.socket(fileno=self.own_listener)]

    def peer_ports(self) -> dict[int, int]:
        """The loopback ports of the other slots, by number."""
        return {number: port for number, port in enumerate(self.own_ports) if number != self.number}

    def end_with_parent(self) -> None:
        """Die with the parent: without it, nobody could stop this process."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # It ended before the call above.
            os._exit(1)


async def run_group(settings: FrontendSettings, settings_file: str) -> None:
    """Run `frontend.processes` processes until SIGTERM or SIGINT, which they get too.

    Raises OperatorError when the port is taken or a process does not start.
    """
    with ExitStack() as stack:
        group = _ProcessGroup(settings, settings_file, stack)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, group.stop)
        await group.run()


class _ProcessGroup:
    def __init__(self, settings: FrontendSettings, settings_file: str, stack: ExitStack) -> None:
        frontend, count = settings.frontend, settings.frontend.processes
        self._settings, self._settings_file = settings, settings_file
        listeners = _listeners(frontend.host, frontend.port, count)
        own = [socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) for _ in range(count)]
        for listener in (*listeners, *own):
            stack.enter_context(listener)
        ports = [listener.getsockname()[1] for listener in own]
        log_memory = decision_log.create(count, len(settings.per_model()))
        stack.callback(os.close, log_memory)
        self._slots = [
            ProcessSlot(
                number,
                listeners[number].fileno(),
                own[number].fileno(),
                ports,
                log_memory,
                os.getpid(),
            )
            for number in range(count)
        ]
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._num_starting = count
        self._is_stopping = False

    def stop(self) -> None:
        """Let all processes drain, and replace none any more."""
        self._is_stopping = True
        for child in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()

    async def run(self) -> None:
        try:
            async with beating(self._settings.ready_file), asyncio.TaskGroup() as tasks:
                for slot in self._slots:
                    tasks.create_task(self._keep(slot), name=f"frontend-{slot.number}")
        finally:
            for child in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    child.kill()

    async def _keep(self, slot: ProcessSlot) -> None:
        """Run the processes of one slot, one after the other."""
        is_first = True
        loop = asyncio.get_running_loop()
        while not self._is_stopping:
            began = loop.time()
            child = self._running[slot.number] = await self._start(slot)
            assert child.stdout is not None
            line = await child.stdout.readline()
            if line == STARTED and is_first:
                is_first = False
                self._started()
            watch = asyncio.create_task(self._end_when_silent(child, slot.number), name="silence")
            code = await child.wait()
            watch.cancel()
            del self._running[slot.number]
            if self._is_stopping:
                return
            if is_first:
                raise OperatorError(
                    f"frontend process {slot.number} did not start",
                    remedy="see its messages above, in the frontend's log",
                )
            log.error("process %d ended with %d; starting a new one", slot.number, code)
            await asyncio.sleep(max(0.0, began + REPLACE_S - loop.time()))

    async def _end_when_silent(self, child: asyncio.subprocess.Process, number: int) -> None:
        """Kill a process whose event loop does nothing: connections would still arrive there.

        Looks are counted, because all processes are silent while the machine is suspended.
        """
        beat, sign, num_looks = self._settings.beat_file(number), 0, 0
        with contextlib.suppress(OSError):
            beat.touch()
        while num_looks * BEAT_S <= self._settings.silent_s:
            await asyncio.sleep(BEAT_S)
            before = sign
            with contextlib.suppress(OSError):  # the folder is being removed, or the disk is away
                sign = beat.stat().st_mtime_ns
            num_looks = num_looks + 1 if sign == before else 0
        log.error("process %d has been silent for %d s; it is killed", number, num_looks * BEAT_S)
        with contextlib.suppress(ProcessLookupError):
            child.kill()

    async def _start(self, slot: ProcessSlot) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "serving.frontend", self._settings_file]
        child = await asyncio.create_subprocess_exec(
            *command,
            msgspec.json.encode(slot).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(slot.listener, slot.own_listener, slot.decision_log),
        )
        if self._is_stopping:
            child.terminate()
        return child

    def _started(self) -> None:
        self._num_starting -= 1
        if not self._num_starting:
            frontend = self._settings.frontend
            announce_ready(self._settings.ready_file, port=frontend.port)
            log.info(
                "%d processes listen on http://%s:%d",
                frontend.processes,
                frontend.host,
                frontend.port,
            )


def _listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """Raises OperatorError when another program has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # First without SO_REUSEPORT: a service that shares its port would lose connections to us.
        socket.create_server((host, port), family=family).close()
        return [
            socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
            for _ in range(count)
        ]
    except OSError as exc:
        raise OperatorError(
            f"cannot listen on {host}:{port}: {exc}", remedy="set another `frontend.port`"
        ) from exc
