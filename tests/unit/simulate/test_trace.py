"""Recorded workloads are read as their publishers write them."""

from pathlib import Path

import pytest
from serving.errors import OperatorError
from serving.simulate.clock import Clock
from serving.simulate.trace import load_trace


def test_equal_ids_are_equal_prefixes_and_a_last_part_of_a_block_has_no_hash(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 9000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 5]}\n'
        '{"timestamp": 6000, "input_length": 1024, "output_length": 0, "hash_ids": [0, 1]}\n\n'
    )
    trace = load_trace(path)
    first, second = trace.requests
    assert (first.arrival_s, second.arrival_s, trace.duration_s) == (0.0, 3.0, 3.0)
    assert first.block_hashes == second.block_hashes
    assert (len(first.block_hashes), first.completion_tokens) == (2, 1)
    assert trace.faster(2).duration_s == 1.5
    assert trace.part(1).requests == [first]


def test_lengths_alone_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,1300,10\n"
        "2023-11-16 18:17:05.0319600,600,8\n"
    )
    first, second = load_trace(path).requests
    assert second.arrival_s == pytest.approx(1.052)
    assert len({*first.block_hashes, *second.block_hashes}) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jsonl", None),
        ("t.txt", "x"),
        ("t.jsonl", "{}"),
        ("t.jsonl", ""),
        ("t.csv", "A,B\n1,2\n"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n"),
    ],
)
def test_files_that_are_no_trace_are_refused_with_a_remedy(
    tmp_path: Path, name: str, content
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(OperatorError) as caught:
        load_trace(tmp_path / name)
    assert caught.value.remedy


def test_time_passes_in_order_and_stops_where_asked() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, lambda: seen.append(("b", clock())))
    clock.at(1.0, lambda: clock.after(1.0, lambda: seen.append(("c", clock()))))
    clock.at(2.0, lambda: seen.append(("d", clock())))
    clock.at(9.0, lambda: seen.append(("late", clock())))
    clock.run(5.0)
    assert seen == [("b", 2.0), ("d", 2.0), ("c", 2.0)]
    assert clock() == 5.0
