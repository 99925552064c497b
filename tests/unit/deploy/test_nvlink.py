"""Reading `nvidia-smi topo -m`: what it prints on machines of several kinds, colours included."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from serving.deploy.planning.nvlink import Links, islands, joined, observed_links, parse_links

TOPO = Path(__file__).parent / "topo"


def links(name: str) -> Links:
    return parse_links((TOPO / f"{name}.txt").read_text(encoding="utf-8"))


def pairs(*groups: tuple[int, ...]) -> set[frozenset[int]]:
    return {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hgx-8x-nv18", pairs(tuple(range(8)))),
        ("pcie-4x", set()),
        ("pairs-2x2-nv4", pairs((0, 2), (1, 3))),
        ("single", set()),
    ],
)
def test_links_are_those_that_the_matrix_shows(name: str, expected: set[frozenset[int]]) -> None:
    assert links(name) == expected


@pytest.mark.parametrize(
    "text", ["", "Failed to initialize NVML: Driver/library mismatch\n", "X\n"]
)
def test_anything_else_shows_no_links(text: str) -> None:
    assert parse_links(text) == frozenset()


def test_islands_are_joined_throughout_and_keep_the_order() -> None:
    assert islands([0, 1, 2, 3], links("pairs-2x2-nv4")) == [[0, 2], [1, 3]]
    assert islands([3, 2, 1], links("pairs-2x2-nv4")) == [[3, 1], [2]]
    assert islands([0, 1], frozenset()) == [[0], [1]]
    assert islands(range(8), links("hgx-8x-nv18")) == [list(range(8))]


def test_a_chain_is_no_island() -> None:
    chain = frozenset({frozenset({0, 1}), frozenset({1, 2})})
    assert joined([0, 1], chain)
    assert not joined([0, 1, 2], chain)
    assert islands([0, 1, 2], chain) == [[0, 1], [2]]


def test_the_driver_is_asked_and_may_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert observed_links() == frozenset()
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\n[ "$*" = "topo -m" ] && exec cat "{TOPO}/pairs-2x2-nv4.txt"\nexit 6\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert observed_links() == pairs((0, 2), (1, 3))
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    assert observed_links() == frozenset()
