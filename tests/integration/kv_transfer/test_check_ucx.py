"""The UCX check with real UCX: between two processes, and with every transport disabled."""

import os

import pytest
from serving.config import Config
from serving.deploy.checks import ucx as checks_ucx
from serving.deploy.checks.findings import judge

pytestmark = pytest.mark.integration


def test_ucx_moves_blocks_between_two_processes_and_leaves_nothing() -> None:
    shm_before = set(os.listdir("/dev/shm"))
    facts = checks_ucx.try_ucx()
    assert facts.error == ""
    assert facts.equal
    assert facts.num_bytes > 1 << 20
    assert facts.transports
    assert judge("check_ucx", checks_ucx.judge_ucx(Config(), True, facts)).ok
    assert set(os.listdir("/dev/shm")) <= shm_before


def test_ucx_without_transports_is_an_error_that_quotes_ucx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "nonesuch")
    facts = checks_ucx.try_ucx()
    assert facts.error
    assert not judge("check_ucx", checks_ucx.judge_ucx(Config(), True, facts)).ok
