"""Deadlines of transfers follow from their size and from the pace of earlier ones."""

from __future__ import annotations

import pytest
from serving.kv_transfer.pace import FACTOR, LEAST_S, TransferPace


def test_nothing_measured_means_the_configured_deadline() -> None:
    assert TransferPace(30.0).limit_s(1000, 0) == 30.0


def test_limit_grows_with_size_and_company_and_never_beyond_the_configured_one() -> None:
    pace = TransferPace(30.0)
    pace.took(1000, 0.1)
    assert pace.limit_s(10, 0) == pytest.approx(LEAST_S + FACTOR * 0.1)
    assert pace.limit_s(4000, 0) == pytest.approx(LEAST_S + FACTOR * 0.4)
    assert pace.limit_s(1000, 3) == pytest.approx(LEAST_S + FACTOR * 0.4)
    assert pace.limit_s(1_000_000, 3) == 30.0


def test_one_slow_transfer_is_forgotten_in_time() -> None:
    pace = TransferPace(30.0)
    pace.took(1000, 2.0)
    assert pace.limit_s(1000, 0) == pytest.approx(LEAST_S + FACTOR * 2.0)
    for _ in range(100):
        pace.took(1000, 0.01)
    assert pace.limit_s(1000, 0) < LEAST_S + 1.0
