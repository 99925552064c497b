"""Load joins reports with our own requests, counting nothing twice and forgetting nothing."""

import random

from serving.kv_router.load import REPORT_MAX_AGE_S, InstanceLoad, Load
from serving.protocol import LoadReport


def report(queued_tokens: int = 0, active_blocks: int = 0, num_running: int = 0) -> LoadReport:
    return LoadReport("w0", 1, num_running, 0, queued_tokens, active_blocks, 0, 1000)


def test_without_a_report_our_own_requests_are_the_load() -> None:
    load = InstanceLoad()
    first = load.reserve(queued_tokens=100, blocks=7)
    load.reserve(queued_tokens=50, blocks=4)
    assert load.estimate(0.0) == Load(150, 11, 2)
    first.release()
    assert load.estimate(0.0) == Load(50, 4, 1)


def test_requests_sent_after_a_report_are_added_to_it() -> None:
    load = InstanceLoad()
    load.report(report(1000, 70, 3), 0.0)
    load.reserve(queued_tokens=100, blocks=7)
    assert load.estimate(0.1) == Load(1100, 77, 4)


def test_a_request_that_a_newer_report_includes_is_not_counted_twice() -> None:
    load = InstanceLoad()
    load.reserve(queued_tokens=100, blocks=7)
    load.report(report(1100, 77, 4), 0.0)
    assert load.estimate(0.1) == Load(1100, 77, 4)


def test_a_request_on_the_wire_while_the_report_was_written_still_counts() -> None:
    load = InstanceLoad()
    load.reserve(queued_tokens=100, blocks=7)
    load.report(report(), 0.0)
    assert load.estimate(0.1) == Load(100, 7, 1)


def test_finishing_what_a_report_has_seen_waits_for_the_next_report() -> None:
    load = InstanceLoad()
    request = load.reserve(queued_tokens=100, blocks=7)
    load.report(report(1100, 77, 4), 0.0)
    request.release()
    assert load.estimate(0.1) == Load(1100, 77, 4)


def test_the_first_output_ends_queueing_but_not_holding() -> None:
    load = InstanceLoad()
    request = load.reserve(queued_tokens=100, blocks=7)
    request.prefilled()
    request.prefilled()
    assert load.estimate(0.0) == Load(0, 7, 1)


def test_generated_blocks_are_held_until_release() -> None:
    load = InstanceLoad()
    request = load.reserve(queued_tokens=0, blocks=7)
    request.grow(2)
    assert load.estimate(0.0).active_blocks == 9
    request.release()
    assert load.estimate(0.0) == Load()


def test_releasing_twice_or_using_a_released_reservation_changes_nothing() -> None:
    load = InstanceLoad()
    request = load.reserve(queued_tokens=100, blocks=7)
    request.release()
    request.release()
    request.prefilled()
    request.grow(3)
    assert load.estimate(0.0) == Load()


def test_a_report_that_is_too_old_is_ignored() -> None:
    load = InstanceLoad()
    load.report(report(9000, 900, 9), 10.0)
    load.reserve(queued_tokens=100, blocks=7)
    assert load.estimate(10.0 + REPORT_MAX_AGE_S).queued_tokens == 9100
    assert load.estimate(10.1 + REPORT_MAX_AGE_S) == Load(100, 7, 1)


def test_any_order_of_requests_and_reports_ends_at_the_last_report() -> None:
    rng = random.Random(3)
    load, running = InstanceLoad(), []
    for _ in range(3000):
        action = rng.random()
        if action < 0.3:
            running.append(load.reserve(queued_tokens=rng.randrange(500), blocks=rng.randrange(9)))
        elif running and action < 0.5:
            rng.choice(running).prefilled()
        elif running and action < 0.7:
            rng.choice(running).grow(1)
        elif running and action < 0.95:
            running.pop(rng.randrange(len(running))).release()
        else:
            load.report(report(), 0.0)
        assert min(*load.in_flight, *load.estimate(0.0)) >= 0
    for request in running:
        request.release()
    assert load.in_flight == Load()
    load.report(report(5, 6, 7), 0.0)
    assert load.estimate(0.0) == Load(5, 6, 7)
