"""How often and when a program that ends by itself is started again, and how that is described."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.deploy.healing import exits
from serving.deploy.healing.exits import how_it_ended, num_out_of_memory
from serving.deploy.healing.restart_policy import (
    RestartPolicy,
    describe,
    pause_before_restart,
    why_down,
)
from serving.restarts import (
    Death,
    RestartRecord,
    forget_restarts,
    read_restart,
    read_restarts,
    write_restart,
)

POLICY = RestartPolicy(restart="on_failure", max_restarts=3, restart_window_s=100.0)


def died_at(*times: float) -> RestartRecord:
    record = RestartRecord(num_restarts=max(0, len(times) - 1))
    for at in times:
        record.died(Death(at, "killed by SIGSEGV"))
    return record


def test_first_restart_is_immediate_and_the_next_ones_wait_longer() -> None:
    times = [10.0, 11.0, 12.0]
    pauses = [
        pause_before_restart(POLICY, died_at(*times[: n + 1]), times[n]) for n in range(len(times))
    ]
    assert pauses == [0.0, 0.5, 1.0]


def test_too_many_deaths_in_the_window_end_it_and_older_ones_do_not_count() -> None:
    loop = died_at(10, 11, 12, 13)
    assert pause_before_restart(POLICY, loop, 13) is None
    assert why_down(POLICY, loop, 13) == (
        "restarted 3 times in 100 s, last exit: killed by SIGSEGV"
    )
    assert pause_before_restart(POLICY, died_at(10, 111, 112, 113), 113) == 1.0


def test_history_in_words() -> None:
    assert describe(RestartRecord(), 0.0) == ""
    assert (
        describe(died_at(10, 20), 50.0) == "restarted once, last exit 30 s ago: killed by SIGSEGV"
    )
    down = RestartRecord(down="restarted 5 times in 3 minutes, last exit: exit status 1")
    assert describe(down, 0.0).startswith("down: restarted 5 times in 3 minutes")


def test_records_are_kept_by_program_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    write_restart("nats", died_at(1.0), tmp_path)
    assert read_restart("nats", tmp_path) == died_at(1.0)
    (tmp_path / "etcd.json").write_text("{")
    assert read_restarts(tmp_path) == {"etcd": RestartRecord(), "nats": died_at(1.0)}
    forget_restarts("nats", tmp_path)
    assert read_restart("nats", tmp_path) == RestartRecord()


@pytest.mark.parametrize(
    ("line", "status", "out_of_memory", "expected"),
    [
        ("exited: a (exit status 3; not expected)", 3, None, "exit status 3"),
        (
            "exited: a (exit status 70; not expected)",
            70,
            None,
            "its engine was broken (exit status 70)",
        ),
        ("exited: a (terminated by SIGSEGV; not expected)", -1, None, "killed by SIGSEGV"),
        (
            "exited: a (terminated by SIGABRT (core dumped); not expected)",
            -1,
            True,
            "killed by SIGABRT",
        ),
        (
            "exited: a (terminated by SIGKILL; not expected)",
            -1,
            None,
            "killed by SIGKILL, probably out of memory",
        ),
        ("exited: a (terminated by SIGKILL; not expected)", -1, False, "killed by SIGKILL"),
        ("exited: ab (terminated by SIGSEGV; not expected)", -1, None, "killed by a signal"),
    ],
)
def test_end_by_a_signal_is_named(
    tmp_path: Path, line: str, status: int, out_of_memory: bool | None, expected: str
) -> None:
    log = tmp_path / "supervisord.log"
    log.write_text(
        "2026-01-01 00:00:00,000 WARN exited: a (terminated by SIGTERM; not expected)\n"
        if "exited: a " in line
        else ""
    )
    with log.open("a") as file:
        file.write(f"2026-01-01 00:00:01,000 WARN {line}\n")
    assert how_it_ended("a", status, out_of_memory=out_of_memory, log=log) == expected


def test_kernel_counts_processes_that_ran_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "vmstat"
    stat.write_text("nr_free_pages 3\noom_kill 17\n")
    monkeypatch.setattr(exits, "VMSTAT", stat)
    assert num_out_of_memory() == 17
    stat.unlink()
    assert num_out_of_memory() == 0
