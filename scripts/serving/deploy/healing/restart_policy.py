"""When a program that ended by itself is started again, and when not any more. Pure: no I/O.

supervisord counts only programs that end right after their start. A worker that loads for a minute
and then crashes would be restarted for ever.
"""

from __future__ import annotations

from msgspec import Struct

from serving.config import Config
from serving.config.deployment import Restart
from serving.restarts import RestartRecord

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class RestartPolicy(Struct, frozen=True, kw_only=True):
    """The keys of the section `deployment` by these names."""

    restart: Restart = "never"
    max_restarts: int = 5
    restart_window_s: float = 180.0
    silent_s: float = 10.0


def restart_policy(config: Config) -> RestartPolicy:
    deployment = config.deployment
    return RestartPolicy(
        restart=deployment.restart,
        max_restarts=deployment.max_restarts,
        restart_window_s=deployment.restart_window_s,
        silent_s=deployment.silent_s,
    )


def pause_before_restart(policy: RestartPolicy, record: RestartRecord, now: float) -> float | None:
    """Seconds from the last death on record to the next start; None: it stays down.

    The first restart is immediate, and each further one within the window waits twice as long.
    """
    count = _num_recent(policy, record, now)
    if count > policy.max_restarts:
        return None
    if count <= 1:
        return 0.0
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (count - 2)))


def why_down(policy: RestartPolicy, record: RestartRecord, now: float) -> str:
    """For people: why a program is not started any more."""
    count = _num_recent(policy, record, now) - 1
    times = "once" if count == 1 else f"{count} times"
    return (
        f"restarted {times} in {in_words(policy.restart_window_s)}, last exit: "
        f"{record.deaths[-1].how}"
    )


def describe(record: RestartRecord, now: float) -> str:
    """For people: how often a program was started again; empty when it never ended by itself."""
    if record.down:
        return f"down: {record.down}"
    if not record.deaths:
        return ""
    last = record.deaths[-1]
    times = "once" if record.num_restarts == 1 else f"{record.num_restarts} times"
    return f"restarted {times}, last exit {in_words(round(now - last.at))} ago: {last.how}"


def in_words(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds:.3g} s"


def _num_recent(policy: RestartPolicy, record: RestartRecord, now: float) -> int:
    return sum(death.at > now - policy.restart_window_s for death in record.deaths)
