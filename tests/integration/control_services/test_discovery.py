"""Registrations and watches against a real etcd that is killed, wiped, compacted and stopped."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from etcd3aio import Etcd3Client
from integration.services import Etcd
from serving.discovery import Discovery
from serving.discovery.etcd import EtcdClient, Stored
from serving.discovery.presence import MASS_S
from serving.errors import OperatorError
from serving.protocol import InstanceInfo, ModelCard, Role
from waiting import until

pytestmark = pytest.mark.integration

LEASE_S = 2
CARD = ModelCard("model", "dir", 128, 16, "salt", "fingerprint", 0)


def instance(name: str, epoch: int = 1, role: Role = "decode") -> InstanceInfo:
    return InstanceInfo(name, epoch, role, ["tcp://127.0.0.1:1"], "", CARD, 10, 4, 1, "here")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with Etcd(tmp_path / "etcd") as service:
        assert isinstance(service, Etcd)
        yield service


class Watcher:
    """What a watch reported, in order, and who is up by that account."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def up(self, info: InstanceInfo) -> None:
        self.events.append(("up", info.instance_id, info.epoch))

    def down(self, instance_id: str, epoch: int) -> None:
        self.events.append(("down", instance_id, epoch))

    @property
    def present(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for what, name, epoch in self.events:
            if what == "up":
                assert name not in found, "up twice"
                found[name] = epoch
            else:
                assert found.pop(name) == epoch
        return found


@asynccontextmanager
async def watching(
    etcd: Etcd, namespace: str = "ns", etcd_type: type[EtcdClient] = EtcdClient
) -> AsyncIterator[Watcher]:
    watcher = Watcher()
    async with etcd_type.connect(etcd.endpoint) as client:
        discovery = Discovery(client, namespace, LEASE_S)
        task = asyncio.create_task(discovery.watch(watcher.up, watcher.down))
        try:
            yield watcher
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def registered(etcd: Etcd, info: InstanceInfo) -> AsyncIterator[Discovery]:
    async with Discovery.connect(etcd.endpoint, "ns", lease_s=LEASE_S) as discovery:
        await discovery.register(info, deadline_s=10)
        yield discovery


async def test_watchers_see_an_instance_register_and_leave(etcd: Etcd) -> None:
    stays = instance("stays")
    async with (
        watching(etcd) as watcher,
        watching(etcd, "other") as stranger,
        registered(etcd, stays),
    ):
        async with registered(etcd, instance("a")) as discovery:
            await until(lambda: watcher.present == {"a": 1, "stays": 1})
            assert await discovery.instances() == [instance("a"), stays]
            async with watching(etcd) as latecomer:
                await until(lambda: latecomer.present == {"a": 1, "stays": 1})
            left = time.monotonic()
            await discovery.unregister()
            await until(lambda: watcher.present == {"stays": 1})
            assert time.monotonic() - left < LEASE_S / 2
            assert await discovery.instances() == [stays]
        assert stranger.events == []


async def test_registration_outlives_its_lease_time(etcd: Etcd) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a")):
        await asyncio.sleep(1.75 * LEASE_S)
        assert watcher.events == [("up", "a", 1)]


async def test_lost_lease_removes_the_instance(etcd: Etcd) -> None:
    """A worker killed with -9 stops renewing and says nothing."""
    async with watching(etcd) as watcher, Etcd3Client([etcd.endpoint]) as client:
        assert client.lease is not None
        assert client.kv is not None
        lease = await client.lease.grant(LEASE_S)
        value = msgspec.json.encode(instance("dead"))
        await client.kv.put("/ns/instances/dead", value, lease=lease.ID)
        await until(lambda: watcher.present == {"dead": 1})
        await until(lambda: watcher.present == {}, 3 * LEASE_S + 2)


async def test_leases_that_run_out_while_etcd_stands_still_take_no_instance_down(
    etcd: Etcd,
) -> None:
    """Its watches only look quiet meanwhile, and the deletions arrive when it goes on."""
    names = {"a": 1, "b": 1, "c": 1}
    async with (
        watching(etcd) as watcher,
        registered(etcd, instance("a")),
        registered(etcd, instance("b")),
        registered(etcd, instance("c")) as discovery,
    ):
        await until(lambda: watcher.present == names)
        etcd.signal(signal.SIGSTOP)
        await asyncio.sleep(2 * LEASE_S)
        etcd.signal(signal.SIGCONT)
        await until_registered(discovery, 3)
        await asyncio.sleep(LEASE_S / 4)
        assert [event for event in watcher.events if event[0] == "down"] == []


async def until_registered(discovery: Discovery, num_instances: int) -> None:
    async with asyncio.timeout(5 * LEASE_S):
        # A second watch would be another thing under test.
        while len(await discovery.instances()) < num_instances:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_etcd_restarted_with_its_data_changes_nothing(etcd: Etcd) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a")):
        await until(lambda: watcher.present == {"a": 1})
        etcd.kill()
        await asyncio.sleep(1.5 * LEASE_S)  # longer than the lease: the last known membership stays
        etcd.start()
        await asyncio.sleep(1.5 * LEASE_S)
        assert watcher.events == [("up", "a", 1)]
        async with registered(etcd, instance("b")):
            await until(lambda: watcher.present == {"a": 1, "b": 1})  # and the watch works


async def test_etcd_restarted_empty_keeps_every_living_instance(etcd: Etcd) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a")) as discovery:
        async with registered(etcd, instance("mortal")) as mortal:
            await until(lambda: watcher.present == {"a": 1, "mortal": 1})
            etcd.kill()
            etcd.wipe()
            await mortal.unregister()
        etcd.start()
        await until(lambda: watcher.present == {"a": 1}, 4 * LEASE_S)
        assert watcher.events[-1] == ("down", "mortal", 1)
        assert ("down", "a", 1) not in watcher.events
        assert await discovery.instances() == [instance("a")]
        async with registered(etcd, instance("b")):
            await until(lambda: watcher.present == {"a": 1, "b": 1})


async def test_etcd_that_hangs_longer_than_the_lease_heals(etcd: Etcd) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a")) as discovery:
        await until(lambda: watcher.present == {"a": 1})
        etcd.signal(signal.SIGSTOP)
        await asyncio.sleep(1.5 * LEASE_S)
        assert watcher.present == {"a": 1}
        etcd.signal(signal.SIGCONT)
        await asyncio.sleep(LEASE_S)
        await until(lambda: watcher.present == {"a": 1})
        assert await discovery.instances() == [instance("a")]


async def test_compaction_behind_a_disconnected_watch_heals(etcd: Etcd) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a")):
        await until(lambda: watcher.present == {"a": 1})
        etcd.signal(signal.SIGSTOP)
        etcd.kill()
        etcd.start()
        async with Etcd3Client([etcd.endpoint]) as client:
            assert client.kv is not None
            for number in range(20):
                answer = await client.kv.put("/elsewhere", str(number))
            await client.kv.compact(answer.header.revision, physical=True)
        async with registered(etcd, instance("b")):
            await until(lambda: watcher.present == {"a": 1, "b": 1})
        await until(lambda: watcher.present == {"a": 1})


async def test_watch_cancelled_by_compaction_lists_again(etcd: Etcd) -> None:
    """The list is answered, then the history behind it is compacted before the watch starts."""
    num_lists = 0

    class CompactedAfterList(EtcdClient):
        async def list(self, prefix: str) -> tuple[int, list[Stored]]:
            nonlocal num_lists
            num_lists += 1
            result = await super().list(prefix)
            if num_lists == 1:
                async with Etcd3Client([etcd.endpoint]) as client:
                    assert client.kv is not None
                    value = msgspec.json.encode(instance("between"))
                    await client.kv.put("/ns/instances/between", value)
                    for number in range(5):
                        answer = await client.kv.put("/elsewhere", str(number))
                    await client.kv.compact(answer.header.revision, physical=True)
            return result

    async with watching(etcd, etcd_type=CompactedAfterList) as watcher:
        await until(lambda: watcher.present == {"between": 1})
        async with registered(etcd, instance("a")):
            await until(lambda: watcher.present == {"between": 1, "a": 1})
    assert num_lists >= 2


async def test_newer_epoch_replaces_and_the_older_one_does_not_come_back(
    etcd: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(etcd) as watcher, registered(etcd, instance("a", 1)):
        await until(lambda: watcher.present == {"a": 1})
        async with registered(etcd, instance("a", 2)) as newer:
            await until(lambda: watcher.present == {"a": 2})
            assert watcher.events[1:] == [("down", "a", 1), ("up", "a", 2)]
            await until(lambda: "it does not register again" in caplog.text)
            assert await newer.instances() == [instance("a", 2)]
        await until(lambda: watcher.present == {})
        await asyncio.sleep(LEASE_S / 2)
        assert watcher.present == {}


async def test_older_epoch_cannot_register_over_a_newer_one(etcd: Etcd) -> None:
    async with (
        registered(etcd, instance("a", 2)),
        Discovery.connect(etcd.endpoint, "ns", lease_s=LEASE_S) as older,
    ):
        with pytest.raises(OperatorError, match="epoch 2 has registered"):
            await older.register(instance("a", 1), deadline_s=1.0)


async def test_deleted_key_is_put_again_while_the_lease_lives(etcd: Etcd) -> None:
    names = {"a": 1, "b": 1, "c": 1}
    async with (
        watching(etcd) as watcher,
        registered(etcd, instance("a")),
        registered(etcd, instance("b")),
        registered(etcd, instance("c")) as discovery,
        Etcd3Client([etcd.endpoint]) as client,
    ):
        await until(lambda: watcher.present == names)
        assert client.kv is not None
        await client.kv.delete("/ns/instances/a")
        await until(lambda: watcher.events[-2:] == [("down", "a", 1), ("up", "a", 1)])

        # All of them: etcd is to blame, so they stay up and register again.
        await asyncio.sleep(MASS_S)
        for name in names:
            await client.kv.delete(f"/ns/instances/{name}")
        await until_registered(discovery, 3)
        await asyncio.sleep(LEASE_S / 4)
        assert watcher.present == names


async def test_garbage_under_the_prefix_is_skipped(etcd: Etcd) -> None:
    async with Etcd3Client([etcd.endpoint]) as client:
        assert client.kv is not None
        await client.kv.put("/ns/instances/text", "not json")
        await client.kv.put("/ns/instances/alias", msgspec.json.encode(instance("other")))
        async with watching(etcd) as watcher, registered(etcd, instance("a")) as discovery:
            await client.kv.put("/ns/instances/late", b"\xff\x00")
            await client.kv.delete("/ns/instances/late")
            await until(lambda: watcher.present == {"a": 1})
            assert await discovery.instances() == [instance("a")]


async def test_without_etcd_connecting_works_and_registering_reports_the_reason(
    tmp_path: Path,
) -> None:
    absent = Etcd(tmp_path)
    async with Discovery.connect(absent.endpoint, "ns", lease_s=LEASE_S) as discovery:
        assert not discovery.connected
        with pytest.raises(OperatorError, match=r"within 0\.5 s"):
            await discovery.register(instance("a"), deadline_s=0.5)
        with pytest.raises(OperatorError, match="did not answer"):
            await discovery.instances(0.5)


async def test_etcd_that_starts_late_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    etcd = Etcd(tmp_path)
    async with (
        watching(etcd) as watcher,
        Discovery.connect(etcd.endpoint, "ns", lease_s=LEASE_S) as discovery,
    ):
        registering = asyncio.create_task(discovery.register(instance("a"), deadline_s=20))
        await until(lambda: "is not registered" in caplog.text and "is away" in caplog.text)
        assert not discovery.connected
        with etcd:
            await registering
            assert discovery.connected
            await until(lambda: watcher.present == {"a": 1})
