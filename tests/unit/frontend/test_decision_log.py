"""Processes of a frontend see each other's routing decisions at once, and no false ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving.frontend import decision_log
from serving.frontend.decision_log import CAPACITY, DecisionLog
from serving.kv_router.peers import RoutingDecision


def decision(number: int, at_s: float | None = None) -> RoutingDecision:
    return RoutingDecision(
        2**64 - 1 - number, float(number) if at_s is None else at_s, number, number % 7
    )


@pytest.fixture
def memory() -> Iterator[int]:
    memory = decision_log.create(3)
    yield memory
    os.close(memory)


def logs(memory: int) -> list[DecisionLog]:
    return [DecisionLog(memory, number, 3) for number in range(3)]


def test_peers_read_each_decision_once_and_its_writer_never(memory: int) -> None:
    writer, reader, third = logs(memory)
    writer.publish(decision(1))
    assert reader.updates() == third.updates() == [decision(1)]
    assert reader.updates() == writer.updates() == []
    writer.publish(decision(2))
    writer.publish(decision(3))
    assert reader.updates() == [decision(2), decision(3)]


def test_decisions_of_several_processes_are_read_in_the_order_they_were_made(memory: int) -> None:
    writer, reader, third = logs(memory)
    writer.publish(decision(1, at_s=5.0))
    third.publish(decision(2, at_s=4.0))
    writer.publish(decision(3, at_s=6.0))
    assert [decision.queued_tokens for decision in reader.updates()] == [2, 1, 3]


def test_new_process_skips_earlier_decisions_and_continues_the_numbers_of_its_slot(
    memory: int,
) -> None:
    writer, reader, _ = logs(memory)
    for number in range(1, 6):
        writer.publish(decision(number))
    successor = DecisionLog(memory, 0, 3)
    late = DecisionLog(memory, 2, 3)
    assert late.updates() == []
    successor.publish(decision(9))
    assert late.updates() == [decision(9)]
    assert reader.updates() == [*map(decision, range(1, 6)), decision(9)]


@pytest.mark.parametrize("torn", range(0, 40, 3))
def test_half_written_entry_is_ignored_and_then_overwritten(memory: int, torn: int) -> None:
    writer, reader, _ = logs(memory)
    writer.publish(decision(1))
    writer.publish(decision(2))
    at = 2 * decision_log._ENTRY + torn
    os.pwrite(memory, bytes(byte ^ 255 for byte in os.pread(memory, 1, at)), at)
    assert reader.updates() == [decision(1)]
    assert reader.updates() == []
    successor = DecisionLog(memory, 0, 3)
    successor.publish(decision(3))
    assert reader.updates() == [decision(3)]


@pytest.mark.parametrize("missed", [0, 1, CAPACITY // 2, CAPACITY - 1, CAPACITY, 5 * CAPACITY + 3])
def test_reader_more_than_a_round_behind_misses_only_the_oldest(memory: int, missed: int) -> None:
    writer, reader, _ = logs(memory)
    writer.publish(decision(0))
    reader.updates()
    total = CAPACITY + missed
    for number in range(1, total + 1):
        writer.publish(decision(number))
    assert reader.updates() == [decision(number) for number in range(missed + 1, total + 1)]
    writer.publish(decision(7))
    assert reader.updates() == [decision(7)]


def test_numbers_that_are_too_large_are_clamped(memory: int) -> None:
    writer, reader, _ = logs(memory)
    writer.publish(RoutingDecision(1, 0.0, 2**40, 2**33))
    assert reader.updates() == [RoutingDecision(1, 0.0, 2**32 - 1, 2**32 - 1)]


SCRIPTS = Path(__file__).parents[3] / "scripts"
WRITE = """
import sys
from serving.frontend.decision_log import DecisionLog
from serving.kv_router.peers import RoutingDecision
memory, number, count = map(int, sys.argv[1:])
log = DecisionLog(memory, number, 3)
print("ready", flush=True)
sys.stdin.readline()
for each in range(count):
    log.publish(RoutingDecision(number, float(each), each, 0))
"""


def test_no_decision_is_lost_or_invented_between_processes(memory: int) -> None:
    """Two write as fast as they can while this writer reads."""
    count, reader = 3000, DecisionLog(memory, 2, 3)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WRITE, str(memory), str(number), str(count)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    pass_fds=[memory],
                )
            )
            for number in range(2)
        ]
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            assert writer.stdin
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        found: list[RoutingDecision] = []
        while any(writer.poll() is None for writer in writers):
            found += reader.updates()
        found += reader.updates()
    for number, writer in enumerate(writers):
        assert writer.returncode == 0
        own = [each.queued_tokens for each in found if each.registration == number]
        assert own == list(range(count))
    assert len(found) == 2 * count


def test_models_keep_their_decisions_apart() -> None:
    memory = decision_log.create(2, num_models=3)
    try:
        writers = [DecisionLog(memory, 0, 2, model) for model in range(3)]
        readers = [DecisionLog(memory, 1, 2, model) for model in range(3)]
        for number, writer in enumerate(writers):
            writer.publish(decision(number + 1))
        assert [reader.updates() for reader in readers] == [
            [decision(1)],
            [decision(2)],
            [decision(3)],
        ]
    finally:
        os.close(memory)
