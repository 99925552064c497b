"""A program to run, and the plan of a deployment: which programs, in which order.

A program's `fingerprint` covers its settings and the code it runs. Settings that may change under a
running program (the deadline of its start, thread counts left to `auto`) are not part of it, so one
more worker restarts no other program.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from serving.config import Topology
from serving.errors import ConfigError


class Program(Struct, frozen=True, kw_only=True):
    """One process to run. `settings` is the text of the file it reads, `settings_file` its path.

    `{python}` in `command` stands for the interpreter of whoever starts it. `ports` maps config
    keys to the TCP ports it will listen on, at `host`. `engine` is the fingerprint of the engine it
    serves, empty for etcd and NATS.
    """

    name: str
    command: list[str]
    fingerprint: str
    host: str
    ports: dict[str, int]
    settings: str
    settings_file: str
    engine: str
    start_s: float
    stop_s: float


class DeploymentPlan(Struct, frozen=True, kw_only=True):
    """What should run, in the order to start it. It is stopped in the reverse order."""

    topology: Topology
    engine_fingerprint: str
    engine_dir: str
    programs: list[Program]

    def __getitem__(self, name: str) -> Program:
        for program in self.programs:
            if program.name == name:
                return program
        raise ConfigError(
            "",
            f"{name} is no program of the topology {self.topology}",
            remedy="request a serve_* target; `workers.*` says how many workers there are",
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        return {program.name: program.fingerprint for program in self.programs}

    @property
    def workers(self) -> list[str]:
        return [p.name for p in self.programs if p.name.startswith("worker-")]


def stop_tiers(names: Sequence[str]) -> list[list[str]]:
    """Programs to stop together, in order: first those that take requests, last those that others
    need."""
    order = {"frontend": 0, "worker": 1, "nats": 2, "etcd": 3}
    tiers: dict[int, list[str]] = {}
    for name in names:
        tiers.setdefault(order.get(name.split("-")[0], 1), []).append(name)
    return [tiers[tier] for tier in sorted(tiers)]


def program_fingerprint(parts: Sequence[Any]) -> str:
    """16 hex digits over everything whose change must restart the program."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
