"""A deployment whose programs can be killed, stopped, broken and made to hang."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from integration.deployment import Deployment
from integration.healing.faulty import sitecustomize as faulty
from integration.tiny_model import save_tiny_model
from waiting import wait_until

FAULTY = Path(__file__).parent / "faulty"


class BreakableDeployment(Deployment):
    """`silent_s` is short, so that tests of silence are."""

    def __init__(self, folder: Path, backend: str, **sections: Any) -> None:
        model = save_tiny_model(folder / "tiny")
        chosen: dict[str, Any] = {
            "engine": {"backend": backend},
            "workers": {"prefill": 2, "decode": 2},
            "kv_transfer": {"transport": "tcp"},
            "deployment": {"silent_s": 3, "hang_s": 3},
            "router": {"policy": "round_robin"},  # all workers get some of a few prompts
        }
        if backend == "mock":
            chosen["mock"] = {"step_s": 0.01, "prefill_tokens_per_s": 20000}
        for name, section in sections.items():
            chosen.setdefault(name, {}).update(section)
        super().__init__(folder / "deployment", str(model), **chosen)
        self.environment["PYTHONPATH"] = str(FAULTY)

    # --- faults ---------------------------------------------------------------------------------

    def kill(self, program: str) -> None:
        os.kill(self.pid(program), signal.SIGKILL)

    def pause(self, program: str) -> None:
        """Stop it as Ctrl-Z does; it stays in memory with all its connections."""
        os.kill(self.pid(program), signal.SIGSTOP)

    def break_engine(self, worker: str) -> None:
        os.kill(self.pid(worker), faulty.BREAK)

    def hang_engine(self, worker: str) -> None:
        os.kill(self.pid(worker), faulty.HANG)

    # --- what became of it ------------------------------------------------------------------------

    def pid(self, program: str) -> int:
        return self.pids()[program]

    def whole(self) -> bool:
        """All programs are proven ready, and all workers are routed to."""
        pids = self.pids()
        wanted = self.config["workers"]
        workers = [
            f"worker-{role}-{index}"
            for role in ("prefill", "decode")
            for index in range(wanted[role])
        ]
        if not set(pids) >= {"etcd", "nats", "frontend", *workers}:
            return False
        if not all(psutil.pid_exists(pid) for pid in pids.values()):
            return False
        with suppress(Exception):
            rows = {row["instance_id"]: row for row in self.ready()["instances"]}
            return all(
                rows[worker.removeprefix("worker-")]["pid"] == pids[worker]
                and not rows[worker.removeprefix("worker-")]["wedged"]
                for worker in workers
            )
        return False

    def time_to_recover(
        self, program: str, fault: Callable[[str], None], deadline_s: float = 60
    ) -> float:
        """Seconds from the fault until another process of the program is proven and used."""
        before, began = self.pid(program), time.monotonic()
        fault(program)
        try:
            wait_until(
                lambda: self.pids().get(program, before) != before and self.whole(),
                deadline_s,
                f"{program} is back",
            )
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.logs()}") from None
        return time.monotonic() - began

    def restarts(self, program: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(
                (self.directory / "run" / "restarts" / f"{program}.json").read_text()
            )
        except OSError:
            return {"num_restarts": 0, "deaths": [], "down": ""}
        return record
