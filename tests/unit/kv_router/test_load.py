"""Load joins reports with requests sent since: never forgetting one, seldom counting one twice."""

import random

from serving.kv_router.load import REPORT_LAG_S, REPORT_MAX_AGE_S, InstanceLoad, Load
from serving.load_report import LoadReport

LATER = 10 * REPORT_LAG_S


def report(queued_tokens: int = 0, active_blocks: int = 0, num_running: int = 0) -> LoadReport:
    return LoadReport("w0", 1, num_running, 0, queued_tokens, active_blocks, 0, 1000)


def send(load: InstanceLoad, queued_tokens: int = 100, blocks: int = 7, now_s: float = 0.0):
    return load.reserve(queued_tokens=queued_tokens, blocks=blocks, now_s=now_s)


def test_without_a_report_our_own_requests_are_the_load() -> None:
    load = InstanceLoad()
    first = send(load, 100, 7)
    send(load, 50, 4)
    assert load.estimate(0.0) == Load(150, 11, 2)
    first.release()
    assert load.estimate(0.0) == Load(50, 4, 1)


def test_requests_sent_after_a_report_are_added_to_it() -> None:
    load = InstanceLoad()
    load.report(report(1000, 70, 3), 0.0)
    send(load, now_s=0.1)
    assert load.estimate(0.1) == Load(1100, 77, 4)


def test_a_request_that_a_later_report_includes_is_not_counted_twice() -> None:
    load = InstanceLoad()
    send(load)
    load.report(report(1100, 77, 4), LATER)
    assert load.estimate(LATER) == Load(1100, 77, 4)


def test_a_request_on_the_wire_while_the_report_was_written_still_counts() -> None:
    load = InstanceLoad()
    send(load)
    load.report(report(), REPORT_LAG_S / 2)
    assert load.estimate(0.1) == Load(100, 7, 1)
    load.report(report(), LATER)
    assert load.estimate(LATER) == Load()


def test_a_request_that_a_busy_worker_reads_late_is_not_forgotten_meanwhile() -> None:
    load = InstanceLoad()
    send(load)
    for number in range(1, 6):  # each made before the worker came to read what it was sent
        load.report(report(), number * 0.01)
        assert load.estimate(number * 0.01) == Load(100, 7, 1)


def test_a_partly_computed_prompt_counts_as_reported() -> None:
    load = InstanceLoad()
    send(load, 100_000, 70)
    load.report(report(40_000, 70, 1), 5.0)
    assert load.estimate(5.0).queued_tokens == 40_000


def test_the_end_of_a_reported_request_shows_in_the_next_report() -> None:
    load = InstanceLoad()
    request = send(load)
    load.report(report(1100, 77, 4), LATER)
    request.release()
    assert load.estimate(LATER) == Load(1100, 77, 4)


def test_the_end_of_an_unreported_request_counts_at_once() -> None:
    load = InstanceLoad()
    load.report(report(1000, 70, 3), 0.0)
    request = send(load)
    request.prefilled()
    assert load.estimate(0.0) == Load(1000, 77, 4)
    request.release()
    assert load.estimate(0.0) == Load(1000, 70, 3)


def test_requests_of_peer_routers_count_until_a_report_must_contain_them() -> None:
    load = InstanceLoad()
    load.report(report(1000, 70, 3), 0.0)
    load.add_peer_request(Load(500, 30, 1), 1.0, 1.0)
    assert load.estimate(1.0) == Load(1500, 100, 4)
    load.report(report(1000, 70, 3), 1.0 + REPORT_LAG_S / 2)
    assert load.estimate(1.1) == Load(1500, 100, 4)
    load.report(report(1500, 100, 4), 1.0 + LATER)
    assert load.estimate(1.0 + LATER) == Load(1500, 100, 4)


def test_requests_of_peer_routers_expire_at_an_instance_without_reports() -> None:
    load = InstanceLoad()
    load.add_peer_request(Load(500, 30, 1), 1.0, 1.0)
    assert load.estimate(1.5) == Load(500, 30, 1)
    assert load.estimate(1.0 + REPORT_MAX_AGE_S) == Load()


def test_the_first_output_ends_queueing_but_not_holding() -> None:
    load = InstanceLoad()
    request = send(load)
    request.prefilled()
    request.prefilled()
    assert load.estimate(0.0) == Load(0, 7, 1)


def test_generated_blocks_are_held_until_release() -> None:
    load = InstanceLoad()
    request = send(load, 0, 7)
    request.grow(2)
    assert load.estimate(0.0).active_blocks == 9
    request.release()
    assert load.estimate(0.0) == Load()


def test_releasing_twice_or_using_a_released_reservation_changes_nothing() -> None:
    load = InstanceLoad()
    request = send(load)
    request.release()
    request.release()
    request.prefilled()
    request.grow(3)
    assert load.estimate(0.0) == Load()


def test_a_report_that_is_too_old_is_ignored() -> None:
    load = InstanceLoad()
    load.report(report(9000, 900, 9), 10.0)
    send(load, now_s=10.0)
    assert load.estimate(10.0 + REPORT_MAX_AGE_S).queued_tokens == 9100
    assert load.estimate(10.1 + REPORT_MAX_AGE_S) == Load(100, 7, 1)


def test_nothing_piles_up_while_no_report_comes() -> None:
    load = InstanceLoad()
    for number in range(10_000):
        send(load, now_s=number * 0.01).release()
        load.add_peer_request(Load(1, 1, 1), number * 0.01, number * 0.01)
    assert len(load._own) + len(load._of_peers) <= 2 * REPORT_MAX_AGE_S / 0.01 + 2
    assert load.in_flight == Load()


def test_any_order_of_requests_and_reports_ends_at_the_last_report() -> None:
    rng = random.Random(3)
    load, running = InstanceLoad(), []
    for step in range(3000):
        now_s = step * 0.004
        action = rng.random()
        if action < 0.3:
            running.append(send(load, rng.randrange(500), rng.randrange(9), now_s))
        elif running and action < 0.5:
            rng.choice(running).prefilled()
        elif running and action < 0.7:
            rng.choice(running).grow(1)
        elif running and action < 0.9:
            running.pop(rng.randrange(len(running))).release()
        elif action < 0.95:
            load.add_peer_request(Load(rng.randrange(500), rng.randrange(9), 1), now_s, now_s)
        else:
            load.report(report(), now_s)
        assert min(*load.in_flight, *load.unseen, *load.of_peers, *load.estimate(now_s)) >= 0
    for request in running:
        request.release()
    assert load.in_flight == Load()
    load.report(report(5, 6, 7), 100.0)
    assert load.estimate(100.0) == Load(5, 6, 7)
