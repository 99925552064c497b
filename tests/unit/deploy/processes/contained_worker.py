"""A deployment of one worker in a container."""

from __future__ import annotations

from serving.config import Config, parse
from serving.deploy.planning.program import Program
from unit.deploy.resolved import plan_for_test


def config() -> Config:
    raw = {"runtime": "docker", "image": "h/x:1"}
    return parse({"container": raw, "deployment": {"topology": "agg", "stop_s": 3}})


def worker() -> Program:
    return plan_for_test(config(), engine_fingerprint="e1")["worker-agg-0"]
