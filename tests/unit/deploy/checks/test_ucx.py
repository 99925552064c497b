"""UCX between two processes."""

from pathlib import Path

import msgspec
import pytest
from serving.config import Config, parse
from serving.deploy.checks import ucx as checks_ucx
from serving.deploy.checks.findings import judge
from serving.deploy.checks.ucx import UcxFacts
from unit.deploy.checks.finding_names import wrong

UCX = UcxFacts(
    version="ucxx-cu13 0.52", equal=True, num_bytes=4 << 20, seconds=0.01, transports=["tcp/lo"]
)


def test_working_ucx_is_fine_and_its_transports_are_named() -> None:
    findings = checks_ucx.judge_ucx(Config(), True, UCX)
    assert wrong(findings) == {}
    assert findings[-1].detail == "tcp/lo"


@pytest.mark.parametrize(
    "facts",
    [
        UcxFacts(version="", error="the Python package ucxx is not installed"),
        msgspec.structs.replace(UCX, equal=False),
    ],
)
def test_broken_ucx_blocks_only_where_kv_travels_over_it(facts: UcxFacts) -> None:
    tcp = parse({"kv_transfer": {"transport": "tcp"}})
    assert not judge("ucx", checks_ucx.judge_ucx(Config(), True, facts)).ok
    assert judge("ucx", checks_ucx.judge_ucx(Config(), False, facts)).ok
    assert judge("ucx", checks_ucx.judge_ucx(tcp, True, facts)).ok


def test_transports_are_read_from_what_ucx_logs(tmp_path: Path) -> None:
    log = tmp_path / "ucx.log"
    log.write_text("x UCX INFO inter-node cfg#2 tag(tcp/lo posix/memory)  am(tcp/eth0)\n")
    assert checks_ucx._transports(log) == ["posix/memory", "tcp/lo"]
