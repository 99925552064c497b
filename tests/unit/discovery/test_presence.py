"""Which registrations count as instances that are up."""

from __future__ import annotations

import asyncio

import pytest
from serving.discovery.presence import Presence
from serving.protocol import InstanceInfo, ModelCard
from waiting import until

CARD = ModelCard("model", "dir", 128, 16, "salt", "fingerprint", 0)
GRACE_S = 0.05


def instance(name: str, epoch: int = 1) -> InstanceInfo:
    return InstanceInfo(name, epoch, "decode", [], "", CARD, 10, 4, 1, "here")


class Reports:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def up(self, info: InstanceInfo) -> None:
        self.events.append(("up", info.instance_id, info.epoch))

    def down(self, instance_id: str, epoch: int) -> None:
        self.events.append(("down", instance_id, epoch))


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def presence(reports: Reports) -> Presence:
    return Presence(reports.up, reports.down, GRACE_S)


def test_each_instance_comes_up_once_and_goes_down_once(
    presence: Presence, reports: Reports
) -> None:
    presence.put(instance("a"))
    presence.put(instance("a"))
    presence.remove("a")
    presence.remove("a")
    assert reports.events == [("up", "a", 1), ("down", "a", 1)]


def test_newer_epoch_replaces_an_instance_and_an_older_one_is_ignored(
    presence: Presence, reports: Reports
) -> None:
    presence.put(instance("a", 2))
    presence.put(instance("a", 1))
    presence.put(instance("a", 3))
    assert reports.events == [("up", "a", 2), ("down", "a", 2), ("up", "a", 3)]


def test_list_without_grace_takes_missing_instances_down_at_once(
    presence: Presence, reports: Reports
) -> None:
    presence.replace([instance("a"), instance("b")], grace=False)
    presence.replace([instance("b")], grace=False)
    assert reports.events[2:] == [("down", "a", 1)]


async def test_missing_instance_may_register_again_within_the_grace_period(
    presence: Presence, reports: Reports
) -> None:
    presence.replace([instance("a"), instance("b")], grace=False)
    presence.replace([], grace=True)
    presence.put(instance("a"))
    await until(lambda: ("down", "b", 1) in reports.events)
    await asyncio.sleep(2 * GRACE_S)
    assert ("down", "a", 1) not in reports.events


async def test_no_instance_goes_down_while_etcd_is_away(
    presence: Presence, reports: Reports
) -> None:
    presence.put(instance("a"))
    presence.replace([], grace=True)
    presence.hold()
    await asyncio.sleep(2 * GRACE_S)
    assert reports.events == [("up", "a", 1)]


def test_failing_listener_does_not_stop_the_next_report(reports: Reports) -> None:
    def fail(info: InstanceInfo) -> None:
        raise ZeroDivisionError

    presence = Presence(fail, reports.down, GRACE_S)
    presence.put(instance("a"))
    presence.remove("a")
    assert reports.events == [("down", "a", 1)]


async def test_deletion_of_one_registration_counts_at_once(
    presence: Presence, reports: Reports
) -> None:
    presence.replace([instance("a"), instance("b"), instance("c")], grace=False)
    presence.deleted("a")
    assert reports.events[3:] == [("down", "a", 1)]


@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
async def test_registrations_that_vanish_together_may_come_back(
    names: str, presence: Presence, reports: Reports
) -> None:
    """As when their leases ran out while etcd stood still, or somebody deleted them all."""
    presence.replace([instance(name) for name in names], grace=False)
    for name in names:
        presence.deleted(name)
    state = {name: kind for kind, name, _ in reports.events}
    assert state == dict.fromkeys(names, "up")
    for name in names[:-1]:
        presence.put(instance(name))
    await until(lambda: ("down", names[-1], 1) == reports.events[-1])
    await asyncio.sleep(2 * GRACE_S)
    assert {name: kind for kind, name, _ in reports.events} == {
        **dict.fromkeys(names, "up"),
        names[-1]: "down",
    }


async def test_deletion_after_etcd_stood_still_waits_for_the_instance(
    presence: Presence, reports: Reports
) -> None:
    presence.replace([instance(name) for name in "abcd"], grace=False)
    presence.distrust()
    presence.deleted("a")
    assert ("down", "a", 1) not in reports.events
    await until(lambda: ("down", "a", 1) in reports.events)
