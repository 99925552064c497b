"""Instances of two models in one frontend: each is seen by the router of its own model."""

from __future__ import annotations

from typing import Any

from serving.frontend.served.membership import InstancesOfModels
from serving.load_report import LoadReport
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        def record(*arguments: Any) -> None:
            first = arguments[0] if arguments else ""
            self.calls.append((name, getattr(first, "instance_id", first)))

        return record


def info(name: str, model: str, epoch: int = 1) -> InstanceInfo:
    card = ModelCard(model, "", 4096, 16, "salt", "", 0)
    return InstanceInfo(name, epoch, "decode", [], "", card, 1000, 16, 1, "h")


def test_reports_reach_the_model_of_their_instance() -> None:
    first, second = Recorder(), Recorder()
    both: dict[str, Any] = {"a": first, "b": second}
    members = InstancesOfModels(both)
    members.up(info("decode-0", "a"))
    members.up(info("decode-b-0", "b"))
    members.on_kv(KvEventBatch("decode-b-0", 1, 1, []))
    members.on_load(LoadReport(instance_id="decode-0"))
    members.down("decode-b-0", 1)
    members.on_load(LoadReport(instance_id="decode-b-0"))
    members.down("never-seen", 1)
    assert first.calls == [("up", "decode-0"), ("on_load", "decode-0")]
    calls = ["up", "on_kv", "down", "on_load"]  # a draining instance still reports
    assert second.calls == [(call, "decode-b-0") for call in calls]
    members.on_reconnect()
    members.close()
    assert first.calls[-2:] == second.calls[-2:] == [("on_reconnect", ""), ("close", "")]


def test_instance_of_a_strange_model_is_left_to_the_first_one_to_refuse() -> None:
    first, second = Recorder(), Recorder()
    both: dict[str, Any] = {"a": first, "b": second}
    InstancesOfModels(both).up(info("decode-0", "other"))
    assert first.calls == [("up", "decode-0")]
    assert not second.calls


def test_name_that_another_model_takes_over_is_seen_there_alone() -> None:
    first, second = Recorder(), Recorder()
    both: dict[str, Any] = {"a": first, "b": second}
    members = InstancesOfModels(both)
    members.up(info("decode-0", "a", 1))
    members.down("decode-0", 1)
    members.up(info("decode-0", "b", 2))
    members.on_load(LoadReport(instance_id="decode-0"))
    assert first.calls == [("up", "decode-0"), ("down", "decode-0")]
    assert second.calls == [("up", "decode-0"), ("on_load", "decode-0")]
