"""The supervisor with real processes: started, killed, left behind, and stopped whole."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving.deploy.processes.launchers import RUN, ProcessInfo, ProgramSpec
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes, is_alive, tag_of_pid
from serving.errors import OperatorError
from waiting import wait_until

LOOP = "import logging, time\nwhile True: logging.error('tick'); time.sleep(0.05)"
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\nwhile True: time.sleep(0.1)"
)
PARENT = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    " start_new_session=True)\n"
    "print('up', flush=True)\nwhile True: time.sleep(0.1)"
)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.chdir(tmp_path)
    made = Supervisor()
    yield made
    made.shutdown()
    assert [p for p, _ in deployed_processes(RUN)] == []


def spec(name: str = "loop", program: str = LOOP, **changes: Any) -> ProgramSpec:
    """`program` is Python source; it is put into the working directory, which is the test's."""
    facts = {"env": {}, "fingerprint": "f", "stop_s": 5.0, **changes}
    Path(f"{name}.py").write_text(program)
    return ProgramSpec(name=name, command=[sys.executable, "-u", f"{name}.py"], **facts)


def started(supervisor: Supervisor, wanted: ProgramSpec) -> ProcessInfo:
    supervisor.ensure()
    info = supervisor.start(wanted)
    wait_until(lambda: supervisor.state()[wanted.name].launch_id == info.launch_id)
    return info


def keepers() -> list[psutil.Process]:
    """Supervisors of this deployment, and for a moment children that execute no program yet."""
    return [process for process, tag in deployed_processes(RUN) if not tag.program]


@pytest.mark.parametrize("value", ["'both\"", "two\nlines", "'ends with one'", "a ;b"])
def test_environment_that_supervisord_cannot_express_is_refused(
    supervisor: Supervisor, value: str
) -> None:
    supervisor.ensure()
    with pytest.raises(OperatorError, match="cannot express") as caught:
        supervisor.start(spec(env={"UCX_ODD": value}))
    assert "UCX_ODD" in caught.value.remedy


def test_state_is_empty_without_a_supervisor(supervisor: Supervisor) -> None:
    assert supervisor.state() == {}
    assert not supervisor.answers()
    supervisor.stop(["nothing"])
    assert not RUN.exists()


def test_a_supervisor_that_hangs_counts_as_absent(supervisor: Supervisor) -> None:
    RUN.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(RUN / "supervisor.sock"))
        silent.listen()
        impatient = Supervisor(answer_s=0.1)
        assert not impatient.answers()
        assert impatient.state() == {}


def test_started_program_runs_with_its_tags_and_environment(supervisor: Supervisor) -> None:
    odd = "a b, 'c' = 100%, d"
    info = started(supervisor, spec(env={"ODD": odd}, fingerprint="abc", engine="e1"))
    seen = supervisor.state()["loop"]
    assert seen.running
    assert (seen.pid, seen.fingerprint, seen.engine) == (info.pid, "abc", "e1")
    assert psutil.Process(info.pid).environ()["ODD"] == odd
    wait_until(lambda: "tick" in Path("logs/loop.log").read_text())


def test_what_is_exported_after_the_supervisor_began_reaches_programs(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first command that failed has left a supervisor with the environment of that day."""
    monkeypatch.setenv("SERVING_TEST_CHANGED", "old")
    supervisor.ensure()
    monkeypatch.setenv("SERVING_TEST_CHANGED", "new 100%")
    monkeypatch.setenv("SERVING_TEST_GREETING", "over the supervisor's, under the program's")
    monkeypatch.setenv("SERVING_TEST_LINES", "a shell function\nhas several lines")
    info = started(supervisor, spec(env={"GREETING": "hello", "SERVING_TEST_GREETING": "hello"}))
    environment = psutil.Process(info.pid).environ()
    assert environment["SERVING_TEST_CHANGED"] == "new 100%"
    assert environment["SERVING_TEST_GREETING"] == "hello"
    assert "SERVING_TEST_LINES" not in environment


def test_run_folder_and_socket_are_private(supervisor: Supervisor) -> None:
    supervisor.ensure()
    assert RUN.stat().st_mode & 0o777 == 0o700
    assert (RUN / "supervisor.sock").stat().st_mode & 0o777 == 0o700


def test_secrets_of_the_caller_do_not_reach_programs(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    info = started(supervisor, spec())
    assert "HF_TOKEN" not in psutil.Process(info.pid).environ()


def test_deep_directory_is_not_too_long_for_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path.joinpath(*["a-rather-long-folder-name"] * 6)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    made = Supervisor()
    try:
        assert started(made, spec()).pid
    finally:
        made.shutdown()


def test_parallel_jobs_make_one_supervisor(supervisor: Supervisor) -> None:
    failures: list[Exception] = []

    def job(name: str) -> None:
        try:
            supervisor.ensure()
            supervisor.start(spec(name))
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=job, args=(f"loop-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(supervisor.state()) == [f"loop-{i}" for i in range(4)]
    wait_until(lambda: len(keepers()) == 1)


def test_killed_program_is_seen_and_not_restarted_by_itself(supervisor: Supervisor) -> None:
    info = started(supervisor, spec())
    os.kill(info.pid, signal.SIGKILL)
    wait_until(lambda: not supervisor.state()["loop"].running)
    time.sleep(0.3)
    assert not supervisor.state()["loop"].running
    again = supervisor.start(spec(fingerprint="g"))
    assert again.pid != info.pid
    wait_until(lambda: supervisor.state()["loop"].fingerprint == "g")


def test_start_replaces_the_program_of_that_name(supervisor: Supervisor) -> None:
    first = started(supervisor, spec())
    second = started(supervisor, spec(fingerprint="g"))
    assert first.launch_id != second.launch_id
    assert not psutil.pid_exists(first.pid)


def test_one_start_leaves_other_programs_alone(supervisor: Supervisor) -> None:
    first = started(supervisor, spec("one"))
    started(supervisor, spec("two"))
    supervisor.stop(["two"])
    assert supervisor.state()["one"].pid == first.pid
    assert "two" not in supervisor.state()


def test_missing_executable_is_explained(supervisor: Supervisor) -> None:
    supervisor.ensure()
    wanted = ProgramSpec(
        name="ghost", command=["no/such/program"], env={}, fingerprint="", stop_s=1
    )
    with pytest.raises(OperatorError, match="ghost cannot be started") as caught:
        supervisor.start(wanted)
    assert "no/such/program" in caught.value.remedy


def test_stop_ends_children_even_in_sessions_of_their_own(supervisor: Supervisor) -> None:
    info = started(supervisor, spec("parent", PARENT))
    wait_until(lambda: len(psutil.Process(info.pid).children()) == 2)
    children = [child.pid for child in psutil.Process(info.pid).children()]
    supervisor.stop(["parent"])
    assert not any(tag_of_pid(pid) for pid in [info.pid, *children])


def test_program_that_ignores_sigterm_is_killed(supervisor: Supervisor) -> None:
    info = started(supervisor, spec("stubborn", STUBBORN, stop_s=1.0))
    wait_until(lambda: "up" in Path("logs/stubborn.log").read_text())
    supervisor.stop(["stubborn"])
    assert tag_of_pid(info.pid) is None


@pytest.mark.parametrize("owns_log", [False, True])
def test_programs_survive_their_supervisor_until_the_next_one_replaces_them(
    supervisor: Supervisor, owns_log: bool
) -> None:
    info = started(supervisor, spec(owns_log=owns_log))
    keeper = psutil.Process(info.pid).parent()
    assert keeper is not None
    keeper.kill()
    wait_until(lambda: not is_alive(keeper))
    assert supervisor.state() == {}
    assert tag_of_pid(info.pid) is not None
    supervisor.ensure()
    assert tag_of_pid(info.pid) is None
    assert supervisor.state() == {}
    assert supervisor.answers()


def test_program_that_writes_its_own_log_logs_on_without_supervisor(
    supervisor: Supervisor,
) -> None:
    info = started(supervisor, spec(owns_log=True))
    keeper = psutil.Process(info.pid).parent()
    assert keeper is not None
    log = Path("logs/loop.log")
    wait_until(log.exists)
    keeper.kill()
    size = log.stat().st_size
    wait_until(lambda: log.stat().st_size > size)


def test_after_a_reboot_stale_files_do_not_hinder(supervisor: Supervisor) -> None:
    RUN.mkdir()
    (RUN / "programs").mkdir()
    (RUN / "programs" / "old.conf").write_text("[program:old]\ncommand = /bin/false\n")
    (RUN / "supervisord.pid").write_text(f"{os.getpid()}\n")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(RUN / "supervisor.sock"))
    supervisor.ensure()
    assert supervisor.answers()
    assert supervisor.state() == {}


def test_supervisor_whose_socket_was_deleted_is_replaced(supervisor: Supervisor) -> None:
    info = started(supervisor, spec())
    (RUN / "supervisor.sock").unlink()
    supervisor.ensure()
    assert tag_of_pid(info.pid) is None
    assert len(keepers()) == 1


def test_shutdown_stops_programs_and_supervisor(supervisor: Supervisor) -> None:
    info = started(supervisor, spec())
    supervisor.shutdown()
    assert not supervisor.answers()
    assert tag_of_pid(info.pid) is None
