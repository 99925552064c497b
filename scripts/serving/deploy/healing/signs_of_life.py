"""Does a program that runs still do anything? A process that lives proves nothing.

Workers and frontends touch their ready file each second, from the event loop that serves. etcd and
NATS are asked. Silence is counted in looks and not in time: after the whole machine was suspended,
nobody has been silent for long.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from serving.config.process import BEAT_S
from serving.deploy.planning.program import Program
from serving.deploy.processes.launchers import RUN, ProcessInfo
from serving.deploy.processes.readiness import Probe, probe_for
from serving.deploy.processes.startup import OUT_OF_SPACE

LOOK_S = 0.5
"""Time between two looks, at least; a probe of etcd or NATS may take 2 s instead."""
_NUM_PROBES = 4


@dataclass
class _Silence:
    """Of one launch. `sign` is what was seen last, and `num_looks` counts looks without a new one."""

    launch_id: str
    sign: object = None
    num_looks: int = 0
    why: str = ""


class SignsOfLife:
    """Remembers the last sign of each program. Probes run on threads, one for each program."""

    def __init__(self, probe: Callable[[str], Probe] = probe_for) -> None:
        self._probe_for = probe
        self._silences: dict[str, _Silence] = {}
        self._probes: dict[str, tuple[str, Future[str]]] = {}
        self._threads = ThreadPoolExecutor(_NUM_PROBES, thread_name_prefix="probe")

    def forget(self, name: str) -> None:
        self._silences.pop(name, None)
        self._probes.pop(name, None)

    def is_ready(self, program: Program, launch_id: str) -> bool:
        return self._probed(program, launch_id) == ""

    def missing(self, program: Program, info: ProcessInfo, silent_s: float) -> str:
        """Why the program counts as dead; empty while it gives signs of life."""
        silence = self._silences.get(info.name)
        if silence is None or silence.launch_id != info.launch_id:
            silence = self._silences[info.name] = _Silence(info.launch_id)
        if program.name in {"etcd", "nats"}:
            self._ask(program, info, silence)
        else:
            self._watch_beat(info, silence)
        if OUT_OF_SPACE in silence.why:
            return f"etcd does not store any more: {silence.why}"
        if silence.num_looks * LOOK_S <= max(silent_s, 2 * BEAT_S):
            return ""
        return f"silent for {silence.num_looks * LOOK_S:.0f} s: {silence.why}"

    def _watch_beat(self, info: ProcessInfo, silence: _Silence) -> None:
        try:
            sign = (RUN / f"{info.name}.ready").stat().st_mtime_ns
        except OSError:
            silence.num_looks = 0  # it is not ready yet: who started it waits for that
            return
        silence.num_looks = 0 if sign != silence.sign else silence.num_looks + 1
        silence.sign, silence.why = sign, "its event loop does nothing"

    def _ask(self, program: Program, info: ProcessInfo, silence: _Silence) -> None:
        answer = self._probed(program, info.launch_id)
        if answer is None:
            silence.num_looks += bool(silence.why)
        elif answer:
            silence.num_looks, silence.why = silence.num_looks + 1, answer
        else:
            silence.num_looks, silence.why = 0, ""

    def _probed(self, program: Program, launch_id: str) -> str | None:
        """What the last probe found: nothing missing, or something; None: it is under way."""
        known = self._probes.get(program.name)
        if known is not None and known[0] == launch_id:
            if not known[1].done():
                return None
            del self._probes[program.name]
            return known[1].result()
        probe = self._probe_for(program.name)
        self._probes[program.name] = launch_id, self._threads.submit(probe, program, launch_id)
        return None
