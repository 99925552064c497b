"""Every role killed, stopped, broken, hung and out of memory under load: what failed, and for how long.

    python tests/benchmarks/healing.py [--backend mock|torch|both] [--streams N] [--only TEXT]

Starts a deployment of its own (two prefill and two decode workers of a tiny model) with free ports
in a temporary folder. For each fault, a steady load of streams runs from before the fault until
after the program is back, and every answer is compared with the one that the prompt got without
faults. One row per fault, in a table:

- `failed`: requests that ended otherwise, or with another text. 0 is the goal for all but the
  frontend, whose connections die with it.
- `back`: seconds from the fault until the new process is proven ready and routed to; beside it the
  limit: the program's start time and 2 s, and the time of `deployment.silent_s` where it has to be
  noticed by its silence.
- `gap`: longest silence within a stream, in seconds.

Then each control service is killed `--kills` times in a row under load, a poisonous request is sent
under load, and a program is killed until it stays down.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import httpx  # noqa: E402
import psutil  # noqa: E402
from integration.deployment import running  # noqa: E402
from integration.healing.breakable import BreakableDeployment  # noqa: E402
from integration.healing.faulty.sitecustomize import CRASH_SEED, GROW  # noqa: E402
from integration.healing.steady_load import SteadyLoad  # noqa: E402
from serving.deploy.processes.readiness import ANSWER_S  # noqa: E402
from waiting import wait_until  # noqa: E402

SILENT_S = 3.0
NOTICE_S = 2.0
"""What a replacement may take in addition to the start of the program."""
MAX_RESTARTS = 1000
"""The budget is for crash loops of people; this program crashes things on purpose."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=["mock", "torch", "both"], default="both")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="", help="a regular expression: rows to run")
    options = parser.parse_args()
    backends = ["mock", "torch"] if options.backend == "both" else [options.backend]
    wrong = 0
    for backend in backends:
        with tempfile.TemporaryDirectory(prefix="bench-healing-") as folder:
            deployment = BreakableDeployment(
                Path(folder),
                backend,
                deployment={"silent_s": SILENT_S, "max_restarts": MAX_RESTARTS},
            )
            with running(deployment, "serve_disagg"):
                deployment.wait("4 instances", lambda state: len(state["instances"]) == 4)
                bench = Bench(deployment, backend, options.streams, options.only)
                wrong += bench.run(options.kills)
    return 1 if wrong else 0


class Bench:
    """The rows of one deployment. `run` returns how many of them missed their goal."""

    def __init__(
        self, deployment: BreakableDeployment, backend: str, num_streams: int, only: str
    ) -> None:
        self._deployment, self._backend, self._only = deployment, backend, only
        self._num_streams = num_streams
        self._wrong = 0

    def run(self, num_kills: int) -> int:
        deployment = self._deployment
        silent = SILENT_S + 2.0  # a beat, a look, and the time to write where it is stuck
        faults: list[tuple[str, Callable[[str], None], float]] = [
            ("kill -9", deployment.kill, 0.0),
            ("SIGSTOP", deployment.pause, silent),
            ("broken engine", deployment.break_engine, 1.0),
            ("hung engine", deployment.hang_engine, 15.0),
            ("out of memory", self._exhaust_memory, 2.0),
        ]
        print(f"\n{self._backend}: {'fault':34} {'right':>6} {'failed':>6} {'back':>6} "
              f"{'limit':>6} {'gap':>6}  last exit")  # fmt: skip
        for role in ("worker-prefill-0", "worker-decode-1"):
            for title, fault, notice_s in faults:
                self._row(f"{title}: {role}", role, fault, notice_s)
        for service in ("etcd", "nats", "frontend"):
            for title, fault, notice_s in faults[:2]:
                probe_s = ANSWER_S if notice_s and service != "frontend" else 0.0
                self._row(f"{title}: {service}", service, fault, notice_s + probe_s)
        for service in ("etcd", "nats"):
            self._kill_repeatedly(service, num_kills)
        self._poison()
        self._crash_loop()
        return self._wrong

    def _row(self, title: str, program: str, fault: Callable[[str], None], notice_s: float) -> None:
        if not re.search(self._only, title):
            return
        limit_s = self._start_s(program) + NOTICE_S + notice_s
        load = SteadyLoad(self._deployment.url, "tiny", self._num_streams, 60)
        with load.running() as outcomes:
            time.sleep(1.0)
            self._forget_deaths(program)
            back_s = self._deployment.time_to_recover(program, fault, 120)
            time.sleep(1.0)
        is_right = program == "frontend" or (not outcomes.failures and outcomes.num_right > 0)
        is_right = is_right and back_s <= limit_s
        how = self._deployment.restarts(program)["deaths"][-1]["how"]
        self._report(
            is_right,
            f"{title:42} {outcomes.num_right:6} {len(outcomes.failures):6} {back_s:6.1f} "
            f"{limit_s:6.1f} {outcomes.longest_gap_s:6.2f}  {how}",
        )
        if program != "frontend":
            for failure in outcomes.failures[:3]:
                print(f"    {failure}")

    def _start_s(self, program: str) -> float:
        """As its start took, by the log of the rule that started it."""
        text = (self._deployment.directory / "logs" / f"start_{program}.log").read_text()
        return float(re.findall(r"ready after ([\d.]+) s", text)[-1])

    def _exhaust_memory(self, program: str) -> None:
        """The kernel ends it: in a cgroup of its own, which has no room for what it needs next."""
        pid = self._deployment.pid(program)
        group = Path("/sys/fs/cgroup/memory") / f"healing-{pid}"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(4 << 20))
            (group / "cgroup.procs").write_text(str(pid))
            os.kill(pid, GROW)
            wait_until(lambda: not _lives(pid), 10, f"{program} is out of memory")
        finally:
            with suppress(OSError):
                group.rmdir()

    def _kill_repeatedly(self, service: str, num_kills: int) -> None:
        title = f"killed {num_kills} times: {service}"
        if not re.search(self._only, title):
            return
        load = SteadyLoad(self._deployment.url, "tiny", self._num_streams, 60)
        began = time.monotonic()
        with load.running() as outcomes:
            for _ in range(num_kills):
                self._forget_deaths(service)  # or it would wait longer with each
                self._deployment.time_to_recover(service, self._deployment.kill, 120)
        each_s = (time.monotonic() - began) / num_kills
        cpu = max(
            psutil.Process(pid).cpu_percent(0.5)
            for name, pid in self._deployment.pids().items()
            if name.startswith("worker-")
        )
        self._report(
            not outcomes.failures and cpu < 50,
            f"{title:42} {outcomes.num_right:6} {len(outcomes.failures):6} {each_s:6.1f} "
            f"{'':6} {outcomes.longest_gap_s:6.2f}  busiest idle worker afterwards: {cpu:.0f}% of a core",
        )

    def _forget_deaths(self, program: str) -> None:
        record = self._deployment.directory / "run" / "restarts" / f"{program}.json"
        record.unlink(missing_ok=True)

    def _poison(self) -> None:
        title = "poison: a request that crashes its worker"
        if not re.search(self._only, title):
            return
        deployment = self._deployment
        workers = [name for name in deployment.pids() if name.startswith("worker-")]
        before = sum(deployment.restarts(name)["num_restarts"] for name in workers)
        body = {"model": "tiny", "prompt": "poison", "max_tokens": 5, "seed": CRASH_SEED}
        load = SteadyLoad(deployment.url, "tiny", self._num_streams, 60)
        with load.running() as outcomes:
            time.sleep(1.0)
            began = time.monotonic()
            answer = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=60)
            answered_s = time.monotonic() - began
            again = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=60)
            wait_until(deployment.whole, 60)
        crashes = sum(deployment.restarts(name)["num_restarts"] for name in workers) - before
        code = answer.json()["error"]["code"]
        self._report(
            crashes == 2 and code == "request_quarantined" and again.status_code == 500,
            f"{title:42} {outcomes.num_right:6} {len(outcomes.failures):6} {answered_s:6.1f} "
            f"{'':6} {outcomes.longest_gap_s:6.2f}  {crashes} crashes, then {code}",
        )
        for failure in outcomes.failures[:3]:
            print(f"    {failure}")

    def _crash_loop(self) -> None:
        """With the default budget: killed as soon as it is up, until it stays down."""
        title = "crash loop: worker-decode-0"
        if not re.search(self._only, title):
            return
        deployment, name = self._deployment, "worker-decode-0"
        before = deployment.pids()
        deployment.config["deployment"]["max_restarts"] = 5
        deployment.snakemake("serve_disagg")
        same = deployment.pids() == before
        self._forget_deaths(name)
        ends = time.monotonic() + 120
        while not deployment.restarts(name)["down"] and time.monotonic() < ends:
            with suppress(KeyError, ProcessLookupError):
                os.kill(deployment.pid(name), 9)
            time.sleep(0.2)
        status = deployment.snakemake("status").stdout
        [line] = [line for line in status.splitlines() if line.startswith(name)]
        answer = deployment.complete("One two three.")["choices"][0]["finish_reason"]
        self._report(
            "down: restarted 5 times" in line and answer == "length" and same,
            f"{title}: {re.sub(' +', ' ', line)}",
        )
        doctor = deployment.snakemake("doctor", check=False).stdout
        print("    doctor:", next(line for line in doctor.splitlines() if name in line).strip())
        deployment.snakemake("serve_disagg")
        self._report(deployment.whole(), "after the next serve target everything runs")

    def _report(self, is_right: bool, row: str) -> None:
        self._wrong += not is_right
        print(f"{'ok  ' if is_right else 'MISS'} {row}", flush=True)


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.exit(main())
