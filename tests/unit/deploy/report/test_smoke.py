"""The smoke test passes on a service that behaves and names what is wrong with one that does not."""

from pathlib import Path

import msgspec
import pytest
from serving.config import parse
from serving.config.process import ControlServices, FrontendSettings
from serving.deploy.report import smoke
from serving.deploy.report.service_spec import ServiceSpec, read_service_spec
from serving.errors import OperatorError
from unit.deploy.fake_service import BLOCK_SIZE, FakeService, serving


async def run(fake: FakeService, *, disaggregated: bool = True) -> dict[str, smoke.CheckOutcome]:
    async with serving(fake) as url:
        spec = ServiceSpec(
            url=url,
            disaggregated=disaggregated,
            transport="ucx",
            block_size=BLOCK_SIZE,
            exact=True,
        )
        outcomes = await smoke.run_smoke(spec, lambda line: None, report_s=0.6, events_s=0.01)
    return {outcome.name: outcome for outcome in outcomes}


async def test_healthy_service_passes_every_check() -> None:
    outcomes = await run(FakeService("old failure"))
    assert list(outcomes) == [
        *("ready", "models", "chat", "stream", "prefix cache", "kv transfer"),
        *("8 at once", "abort"),
    ]
    assert [o.detail for o in outcomes.values() if not o.ok] == []
    smoke.conclude_smoke(list(outcomes.values()), lambda line: None)


async def test_aggregated_service_needs_no_kv_transfer() -> None:
    outcomes = await run(FakeService("transfer"), disaggregated=False)
    assert "kv transfer" not in outcomes
    assert all(outcome.ok for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("broken", "check", "reason"),
    [
        ("models", "models", "names no model"),
        ("empty", "chat", "answered ''"),
        ("overload", "chat", "503 every worker is full"),
        ("order", "stream", "streamed 'a c b', but at once it is 'a b c'"),
        ("done", "stream", "without [DONE]"),
        ("cache", "prefix cache", "0 the first time, 0 when repeated"),
        ("transfer", "kv transfer", "no KV bytes arrived"),
        ("transport", "kv transfer", "over tcp, not ucx"),
        ("fallback", "kv transfer", "transfers failed"),
        ("leak", "abort", "1 requests still run; blocks held: decode-0 4"),
    ],
)
async def test_broken_service_fails_the_check_for_it(broken: str, check: str, reason: str) -> None:
    outcomes = await run(FakeService(broken))
    assert not outcomes[check].ok
    assert reason in outcomes[check].detail
    with pytest.raises(OperatorError, match="smoke test failed"):
        smoke.conclude_smoke(list(outcomes.values()), lambda line: None)


async def test_blocks_held_without_a_request_fail_the_abort_check() -> None:
    outcomes = await run(FakeService("held"))
    assert outcomes["abort"].detail == ("blocks are held although no request runs: prefill-0 4")


async def test_service_that_is_not_ready_ends_the_test() -> None:
    outcomes = await run(FakeService("ready"))
    assert list(outcomes) == ["ready"]
    assert "no decode worker is registered" in outcomes["ready"].detail


async def test_unreachable_service_is_one_clear_failure() -> None:
    spec = read_service_spec(Path("nowhere"), parse({"frontend": {"port": 9}}))
    (outcome,) = await smoke.run_smoke(spec, lambda line: None)
    assert outcome.name == "ready"
    assert "http://127.0.0.1:9/ready" in outcome.detail


def test_prompts_differ_between_runs_and_fit_the_context() -> None:
    first, second = smoke.long_prompt(16, 512), smoke.long_prompt(16, 512)
    assert first[:40] != second[:40]
    assert 4 * 16 <= len(first) <= 512 // 2 + 5


def test_settings_of_running_programs_take_precedence_over_the_config(tmp_path: Path) -> None:
    config = parse({"frontend": {"host": "0.0.0.0", "port": 8123}})
    control = ControlServices(
        namespace="n", etcd_endpoint="e", lease_s=3, nats_url="u", nats_token_file="t"
    )
    settings = FrontendSettings(
        topology="agg_router",
        disaggregated=False,
        model_name="m",
        frontend=config.frontend,
        router=config.router,
        deadlines=config.deadlines,
        control=control,
        ready_file="r",
    )
    (tmp_path / "frontend.json").write_bytes(msgspec.json.encode(settings))
    (tmp_path / "worker-broken.json").write_text("{")
    spec = read_service_spec(tmp_path, parse({"deployment": {"topology": "disagg"}}))
    assert spec.url == "http://127.0.0.1:8123"
    assert not spec.disaggregated
