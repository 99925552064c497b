"""The doctor's conclusions from what it saw, one fault at a time."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving.config import Config
from serving.deploy.checks.findings import Finding
from serving.deploy.report import doctor, evidence
from serving.deploy.report.diagnosis import Evidence, diagnose, judge_routing
from serving.deploy.report.service_spec import ServiceSpec
from serving.errors import OperatorError
from serving.protocol import InstanceInfo, ModelCard
from unit.deploy.fake_service import BLOCK_SIZE, FakeService, serving

CARD = ModelCard(
    name="m",
    tokenizer_dir="t",
    max_model_len=512,
    block_size=16,
    hash_salt="salt",
    engine_fingerprint="f",
    created=0,
)


def instance(instance_id: str, **card: Any) -> InstanceInfo:
    return InstanceInfo(
        instance_id=instance_id,
        epoch=1,
        role="decode" if instance_id.startswith("decode") else "prefill",
        rpc_addresses=[],
        kv_address="",
        model=msgspec.structs.replace(CARD, **card),
        num_blocks=10,
        max_batch_size=1,
        pid=1,
        host="h",
    )


def ready(*broken: str) -> dict[str, Any]:
    fake = FakeService(*broken)
    return msgspec.json.decode(asyncio.run(fake.ready(None)).body)  # type: ignore[arg-type]


PROGRAMS = ["etcd", "nats", "worker-prefill-0", "worker-decode-0", "frontend"]
WELL = Evidence(
    supervisor=True,
    programs=PROGRAMS,
    states=dict.fromkeys(PROGRAMS, "RUNNING"),
    logs={},
    instances=[instance("prefill-0"), instance("decode-0")],
    ready=ready(),
    reporting={"prefill-0", "decode-0"},
    snapshots={"prefill-0": 3, "decode-0": 0},
)


def wrong(**change: Any) -> dict[str, Finding]:
    findings = diagnose(msgspec.structs.replace(WELL, **change))
    return {finding.name: finding for finding in findings if not finding.ok}


def test_healthy_deployment_has_no_bad_finding() -> None:
    assert wrong() == {}


def test_without_a_deployment_there_is_one_finding() -> None:
    (finding,) = diagnose(Evidence(supervisor=False, programs=[], states={}, logs={}))
    assert "nothing was started" in finding.detail


def test_dead_program_is_shown_with_the_end_of_its_log() -> None:
    found = wrong(
        states={**WELL.states, "worker-decode-0": "EXITED"},
        logs={"worker-decode-0": ["ERROR out of memory"]},
    )
    assert found["worker-decode-0"].detail == "EXITED; its log ends: ERROR out of memory"


@pytest.mark.parametrize(
    ("change", "name", "blocks"),
    [
        ({"supervisor": False}, "supervisor", True),
        ({"etcd_error": "refused", "instances": None}, "etcd reachable", True),
        ({"nats_error": "refused", "reporting": None}, "nats reachable", True),
        ({"instances": [instance("prefill-0")]}, "decode-0 registered", True),
        (
            {"instances": [*(WELL.instances or []), instance("prefill-0"), instance("agg-7")]},
            "agg-7 registered",
            False,
        ),
        ({"ready": None, "frontend_error": "refused"}, "frontend answers", True),
        ({"ready": ready("ready")}, "frontend ready", True),
        ({"ready": ready("refused")}, "decode-1 accepted", True),
        ({"reporting": {"prefill-0"}}, "decode-0 events", True),
        ({"snapshots": {"prefill-0": 1, "decode-0": "nobody answers"}}, "decode-0 events", True),
        ({"ready": ready("events")}, "decode-0 index", False),
        ({"ready": ready("old failure")}, "decode-0 kv transfer", False),
    ],
)
def test_each_fault_is_found_and_has_a_remedy(
    change: dict[str, Any], name: str, blocks: bool
) -> None:
    finding = wrong(**change)[name]
    assert finding.blocks is blocks
    assert finding.remedy


def test_worker_in_etcd_without_a_connection_to_the_frontend_is_found() -> None:
    state = ready()
    state["instances"] = state["instances"][:1]
    assert "decode-0 connected" in wrong(ready=state)


@pytest.mark.parametrize(
    ("card", "name"),
    [({"block_size": 32}, "one block size"), ({"hash_salt": "other"}, "one hash salt")],
)
def test_workers_with_different_hash_salts_are_named(card: dict[str, Any], name: str) -> None:
    finding = wrong(instances=[instance("prefill-0"), instance("decode-0", **card)])[name]
    assert "prefill-0: " in finding.detail
    assert "decode-0: " in finding.detail


def test_routing_is_proven_by_a_hit_that_the_index_expected() -> None:
    assert judge_routing("kv", 0, 32, 32.0, 16).ok
    assert not judge_routing("kv", 0, 32, 0.0, 16).ok
    assert not judge_routing("kv", 0, 0, 32.0, 16).ok
    assert not judge_routing("kv", 16, 16, 16.0, 16).ok
    assert judge_routing("random", 0, 0, 0.0, 16).ok


async def test_prompt_sent_twice_shows_cold_and_warm_cached_tokens() -> None:
    async with serving(FakeService()) as url:
        spec = ServiceSpec(
            url=url,
            disaggregated=True,
            transport="ucx",
            block_size=BLOCK_SIZE,
            exact=True,
        )
        finding = await doctor._prove_routing(spec, "kv")
    # The fake service has no index metrics, and a hit that no index expected proves nothing.
    assert finding.detail == "cached tokens 0, then 32; the index expected 0"
    assert not finding.ok


def test_last_words_are_the_errors_of_a_log_or_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "worker-agg-0.log"
    log.write_text("started\n2026 worker ERROR no memory\n  | cleaning up\n\n")
    assert evidence.last_words("worker-agg-0", tmp_path) == ["2026 worker ERROR no memory"]
    log.write_text("started\nstopped\n")
    assert evidence.last_words("worker-agg-0", tmp_path) == ["stopped"]
    assert evidence.last_words("frontend", tmp_path) == []


@pytest.mark.parametrize(
    ("greeting", "complaint"), [(b"INFO {}\r\n", ""), (b"SSH-2.0\r\n", "is no NATS server")]
)
async def test_nats_is_recognised_by_its_greeting(greeting: bytes, complaint: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert complaint in await evidence._try_nats(f"nats://127.0.0.1:{port}")
    assert await evidence._try_nats(f"nats://127.0.0.1:{port}")


async def test_doctor_without_a_deployment_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    findings = await doctor.examine(Config())
    lines: list[str] = []
    with pytest.raises(OperatorError, match="nothing was started here"):
        doctor.conclude_doctor(findings, lines.append)
    assert lines


def test_instances_of_other_nodes_belong_to_a_cluster() -> None:
    assert WELL.instances
    first = WELL.instances[0]
    card = msgspec.structs.replace(first.model, engine_fingerprint="built elsewhere")
    other = msgspec.structs.replace(first, instance_id="prefill-n2-0", host="n2", model=card)
    alone = msgspec.structs.replace(WELL, instances=[*WELL.instances, other])
    assert any(not finding.ok for finding in diagnose(alone))
    head = msgspec.structs.replace(alone, position="head")
    found = {finding.name: finding for finding in diagnose(head)}
    assert found["prefill-n2-0 registered"].ok
    assert "one engine" not in found


def test_node_has_no_frontend_to_ask() -> None:
    node = msgspec.structs.replace(WELL, position="node", ready=None)
    assert "frontend answers" not in {finding.name for finding in diagnose(node)}


def test_every_instance_of_a_shared_worker_process_belongs_to_the_deployment() -> None:
    assert WELL.instances
    second = msgspec.structs.replace(WELL.instances[0], instance_id="prefill-0-1")
    both = msgspec.structs.replace(WELL, instances=[*WELL.instances, second])
    assert not {f.name: f for f in diagnose(both)}["prefill-0-1 registered"].ok
    hosted = msgspec.structs.replace(both, own_instances=frozenset({"prefill-0", "prefill-0-1"}))
    assert "prefill-0-1 registered" not in {finding.name for finding in diagnose(hosted)}
