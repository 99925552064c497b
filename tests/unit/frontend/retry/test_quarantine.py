"""A request whose instances fail goes elsewhere, but not everywhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from serving.errors import EngineFailed, InstanceLost, RequestQuarantined, ServingError
from serving.frontend.quarantine import QUARANTINE_S, Failures, Quarantine
from serving.protocol import EngineRequest
from unit.frontend.fake_instances import request
from unit.frontend.scripted_workers import ScriptedWorker, error, pipeline_over, token
from waiting import until

LAST = (0.0, token(8, finish_reason="length"))
BROKEN = (0.0, error("EngineFailed"))


class CrashingWorker(ScriptedWorker):
    """Ends with every request, as a process that is killed by it."""

    def on_generate(self, request: EngineRequest) -> None:
        self.requests.append(request)
        for connection in list(self.server._connections):
            connection.fail("it crashes")


async def test_engine_failure_is_retried_once_elsewhere(tmp_path: Path) -> None:
    bad, good = ScriptedWorker(BROKEN, name="agg-0"), ScriptedWorker(LAST, name="agg-1")
    async with pipeline_over(tmp_path, bad, good) as connected:
        assert [await connected.answer() for _ in range(2)] == [[8], [8]]
    assert len(good.requests) == 2


async def test_request_that_fails_two_engines_is_not_tried_on_a_third(tmp_path: Path) -> None:
    workers = [ScriptedWorker(BROKEN, name=f"agg-{n}") for n in range(4)]
    async with pipeline_over(tmp_path, *workers) as connected:
        with pytest.raises(RequestQuarantined):
            await connected.answer()
    assert sum(len(worker.requests) for worker in workers) == 2


async def test_request_that_crashes_two_workers_ends_and_its_copy_is_refused(
    tmp_path: Path,
) -> None:
    workers = [CrashingWorker(name=f"agg-{n}") for n in range(4)]
    async with pipeline_over(tmp_path, *workers) as connected:
        with pytest.raises(RequestQuarantined, match="2 workers failed"):
            await connected.answer()
        assert sum(len(worker.requests) for worker in workers) == 2
        with pytest.raises(RequestQuarantined, match="the same request is refused"):
            await connected.answer()
        assert sum(len(worker.requests) for worker in workers) == 2
        assert b"serving_quarantined_requests_total 1.0" in connected.metrics.render()


async def test_the_only_worker_fails_and_the_error_is_its_own(tmp_path: Path) -> None:
    async with pipeline_over(tmp_path, ScriptedWorker(BROKEN)) as connected:
        with pytest.raises(EngineFailed, match="why"):
            await connected.answer()
    async with pipeline_over(tmp_path, CrashingWorker()) as connected:
        with pytest.raises(InstanceLost):
            await connected.answer()


async def test_a_replaced_worker_may_get_the_request_that_its_predecessor_lost(
    tmp_path: Path,
) -> None:
    crashing = CrashingWorker(name="agg-0", epoch=1)
    async with pipeline_over(tmp_path, crashing) as connected:
        with suppress(ServingError):
            await connected.answer()
        await crashing.server.close()
        await until(lambda: not connected.routable())
        successor = ScriptedWorker(LAST, name="agg-0", epoch=2)
        connected.instances.down("agg-0", 1)
        await connected.add(await successor.start(tmp_path))
        assert await connected.answer() == [8]
        await successor.server.close()


def test_long_answers_survive_several_failures_between_which_they_progress() -> None:
    failures = Failures()
    verdicts = []
    for _ in range(4):
        failures.add(had_output=True)
        verdicts.append(failures.is_cause)
    assert verdicts == [False, False, False, True]


def test_first_failure_proves_nothing_and_the_second_without_output_does() -> None:
    failures = Failures()
    failures.add(had_output=False)
    assert not failures.is_cause
    failures.add(had_output=False)
    assert failures.is_cause


def test_quarantine_ends_and_means_this_content_only() -> None:
    now = 0.0
    quarantine = Quarantine(clock=lambda: now)
    quarantine.add(request(max_tokens=5))
    quarantine.require_innocent(request(max_tokens=6))
    with pytest.raises(RequestQuarantined):
        quarantine.require_innocent(request("another id", max_tokens=5))
    now = QUARANTINE_S + 1
    quarantine.require_innocent(request(max_tokens=5))
