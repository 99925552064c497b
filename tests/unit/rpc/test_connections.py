"""Connections over real loopback sockets: identity, drain, close, and peers that misbehave."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from serving.errors import (
    InstanceLost,
)
from serving.framing import frame
from serving.protocol import (
    PROTOCOL_VERSION,
    EngineOutput,
    Generate,
    Hello,
    ReleaseKv,
    ToWorker,
)
from serving.rpc import RpcClient, RpcServer
from unit.rpc.rpc_rig import Recorder, RpcRig, closed_by_peer, info_for, request
from waiting import until


@pytest.mark.parametrize("changes", [{"epoch": 8}, {"instance_id": "agg-1"}])
async def test_another_instance_at_the_address_is_not_accepted(
    rig: RpcRig, changes: dict[str, object]
) -> None:
    with pytest.raises(InstanceLost, match="expected"):
        await rig.client(**changes)


async def test_addresses_are_tried_in_order(rig: RpcRig) -> None:
    assert (await rig.client()).address == rig.addresses[0]
    client = await rig.client(rpc_addresses=["unix:/nowhere", "carrier-pigeon", *rig.addresses])
    assert client.address == rig.addresses[0]
    assert (await rig.client(rpc_addresses=rig.addresses[1:])).address.startswith("tcp://")


@asynccontextmanager
async def impostor(says: bytes) -> AsyncIterator[str]:
    """A server that sends `says`, and closes when the client does; yields its address."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        with suppress(OSError):
            await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        done.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.wait_for(done.wait(), 5)


async def test_connect_fails_at_its_deadline() -> None:
    async with impostor(b"") as address:
        with pytest.raises(InstanceLost, match=r"within 0\.1 s"):
            await RpcClient(info_for([address])).connect(0.1)


async def test_drain_is_announced_to_present_and_future_frontends(rig: RpcRig) -> None:
    present = await rig.client()
    rig.server.announce_drain()
    await until(lambda: present.draining)
    future = await rig.client()
    await until(lambda: future.draining)


async def test_closed_server_leaves_no_socket_but_spares_a_successors(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    old, new = RpcServer(Recorder(), "a", 1), RpcServer(Recorder(), "a", 2)
    await old.start("127.0.0.1", str(path))
    await new.start("127.0.0.1", str(path))
    await old.close()
    assert path.exists()
    await new.close()
    assert not path.exists()


async def test_unusable_socket_path_leaves_tcp(tmp_path: Path) -> None:
    server = RpcServer(Recorder(), "agg-0", 7)
    addresses = await server.start("127.0.0.1", str(tmp_path / ("x" * 200)))
    assert [address[:6] for address in addresses] == ["tcp://"]
    await server.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",  # a length beyond the limit
        b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1",  # not msgpack
        frame({"type": "generate"}),  # not a message
        frame(Generate(request("r1"))),  # no hello first
        frame(Hello(PROTOCOL_VERSION + 1)),
        frame(Hello(PROTOCOL_VERSION)) * 2,
    ],
)
async def test_garbage_closes_that_connection_only(rig: RpcRig, garbage: bytes) -> None:
    good = await rig.client()
    reader, writer = await rig.raw()
    writer.write(garbage)
    assert await closed_by_peer(reader)
    await rig.round_trip(good)
    assert rig.handler.requests == []


async def test_garbage_from_a_worker_loses_the_instance() -> None:
    async with impostor(frame(Hello(PROTOCOL_VERSION, "agg-0", 7)) + b"\xff" * 8) as address:
        with pytest.raises(InstanceLost):
            await RpcClient(info_for([address])).connect(5.0)


async def test_frontend_that_stops_reading_is_disconnected(rig: RpcRig) -> None:
    reader, writer = await rig.raw()
    writer.write(frame(Hello(PROTOCOL_VERSION)) + frame(Generate(request("slow"))))
    await until(lambda: rig.server.num_live == 1)
    fast = await rig.client()
    step = [EngineOutput("slow", list(range(1000)))] * 100
    for _ in range(200):
        rig.server.send(step)
    await until(lambda: rig.handler.aborted == ["slow"])
    await rig.round_trip(fast)
    assert await closed_by_peer(reader)


def test_messages_to_a_worker_are_decoded_by_their_tags() -> None:
    message = msgspec.msgpack.decode(frame(ReleaseKv("r"))[4:], type=ToWorker)
    assert message == ReleaseKv("r")
