"""The direct connection over real loopback sockets: streams, aborts, losses, bad peers."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    InvalidRequest,
    ModelNotFound,
    NoInstances,
    Overloaded,
    QueuedTooLong,
    ServingError,
)
from serving.protocol import (
    PROTOCOL_VERSION,
    EngineOutput,
    EngineRequest,
    ErrorInfo,
    Generate,
    Hello,
    InstanceInfo,
    ModelCard,
    Ping,
    SamplingParams,
    Step,
    ToFrontend,
    ToWorker,
)
from serving.rpc import OutputStream, RpcClient, RpcServer, error_info, raise_error

CARD = ModelCard("model", "dir", 128, 16, "salt", "fingerprint", 0)


def info_for(addresses: list[str], *, epoch: int = 7, instance_id: str = "agg-0") -> InstanceInfo:
    return InstanceInfo(instance_id, epoch, "agg", addresses, "", CARD, 10, 4, os.getpid(), "here")


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id, [1, 2, 3], 3, SamplingParams(max_tokens=4))


def token(request_id: str, token_id: int, *, last: bool = False) -> EngineOutput:
    return EngineOutput(request_id, [token_id], "length" if last else None)


class Recorder:
    """An RpcHandler that notes what it was asked, and refuses what `refusal` says."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.released: list[str] = []
        self.refusal: Exception | None = None

    def on_generate(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)

    def on_abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def on_release(self, request_id: str) -> None:
        self.released.append(request_id)


async def until(condition: Callable[[], object], deadline_s: float = 5.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


class House:
    """One server and what is connected to it; closed by the fixture."""

    def __init__(self, handler: Recorder, server: RpcServer, addresses: list[str]) -> None:
        self.handler, self.server, self.addresses = handler, server, addresses
        self.cleanup: list[Callable[[], Awaitable[None]]] = []

    async def client(self, **changes: object) -> RpcClient:
        info = msgspec.structs.replace(info_for(self.addresses), **changes)
        client = RpcClient(info)
        await client.connect(5.0)
        self.cleanup.append(client.close)
        return client

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(
            self.addresses[0].removeprefix("unix:"), limit=2**20
        )

        async def close() -> None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

        self.cleanup.append(close)
        return reader, writer


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    handler = Recorder()
    server = RpcServer(handler, "agg-0", 7, stall_s=0.2)
    house = House(handler, server, await server.start("127.0.0.1", str(tmp_path / "w.sock")))
    yield house
    for close in reversed(house.cleanup):
        await close()
    await server.close()


def frame(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


async def read_frame(reader: asyncio.StreamReader) -> ToFrontend:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgspec.msgpack.decode(await reader.readexactly(size), type=ToFrontend)


async def closed_by_peer(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        with suppress(ConnectionResetError):
            while await reader.read(65536):
                pass
    return True


async def test_steps_that_wait_for_a_frontend_come_as_one_output(house: House) -> None:
    client = await house.client()
    client.merge = True
    async with client.generate(request("r")) as outputs:
        await until(lambda: house.handler.requests)
        house.server.send([EngineOutput("r", [1], cached_tokens=4)])
        house.server.send([EngineOutput("r", [2, 3])])
        house.server.send([EngineOutput("r", [4], "length", stop_token_id=9)])
        await client.ping(5)  # all of it is here
        found = [output async for output in outputs]
    assert found == [EngineOutput("r", [1, 2, 3, 4], "length", 4, 9)]


async def test_merging_stops_at_what_says_more_than_tokens(house: House) -> None:
    client = await house.client()
    client.merge = True
    async with client.generate(request("r")) as outputs:
        await until(lambda: house.handler.requests)
        for token in (1, 2):
            house.server.send([EngineOutput("r", [token])])
        house.server.send([EngineOutput("r", [], "error", error=ErrorInfo("EngineFailed", "no"))])
        await client.ping(5)
        assert (await anext(outputs)).token_ids == [1, 2]
        with pytest.raises(EngineFailed):
            await anext(outputs)


# --- streams -----------------------------------------------------------------------------------


async def test_outputs_arrive_in_order_and_the_stream_ends(house: House) -> None:
    client = await house.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: house.handler.requests)
        assert house.handler.requests == [request("r1")]
        house.server.send([token("r1", 1)])
        house.server.send([token("r1", 2)])
        house.server.send([token("r1", 3, last=True)])
        assert [output.token_ids async for output in outputs] == [[1], [2], [3]]
    assert house.server.num_live == 0
    await client.ping(5.0)
    assert house.handler.aborted == []


async def test_one_step_is_one_frame_for_all_streams_of_a_frontend(house: House) -> None:
    reader, writer = await house.raw()
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    assert isinstance(await read_frame(reader), Hello)
    names = [f"r{i}" for i in range(64)]
    for name in names:
        writer.write(frame(Generate(request(name))))
    await until(lambda: house.server.num_live == 64)
    other = await house.client()
    async with other.generate(request("elsewhere")) as outputs:
        await until(lambda: house.server.num_live == 65)
        house.server.send([token(name, 5) for name in [*names, "elsewhere", "unknown"]])
        step = await read_frame(reader)
        assert isinstance(step, Step)
        assert [output.request_id for output in step.outputs] == names
        assert (await anext(outputs)).token_ids == [5]
    writer.write(frame(Ping(1)))
    assert not isinstance(await read_frame(reader), Step)  # nothing else was sent


async def test_leaving_early_aborts_on_the_worker(house: House) -> None:
    client = await house.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: house.handler.requests)
        house.server.send([token("r1", 1)])
        async for _ in outputs:
            break
    await until(lambda: house.handler.aborted == ["r1"])
    assert house.server.num_live == 0
    house.server.send([token("r1", 2)])  # the engine's last word finds nobody, quietly
    await client.ping(5.0)


async def test_release_reaches_the_worker_after_the_request_ended(house: House) -> None:
    client = await house.client()
    async with client.generate(request("r1")) as outputs:
        await until(lambda: house.handler.requests)
        house.server.send([token("r1", 1, last=True)])
        await anext(outputs)
    client.release("r1")
    await until(lambda: house.handler.released == ["r1"])
    assert house.handler.aborted == []


async def test_cancelled_consumer_aborts_on_the_worker(house: House) -> None:
    client = await house.client()

    async def consume() -> None:
        async with client.generate(request("r1")) as outputs:
            async for _ in outputs:
                pass

    task = asyncio.create_task(consume())
    await until(lambda: house.handler.requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: house.handler.aborted == ["r1"])


async def test_frontend_disconnect_aborts_its_requests_only(house: House) -> None:
    leaving, staying = await house.client(), await house.client()
    async with staying.generate(request("stays")) as kept:
        lost = [leaving.generate(request(name)) for name in ("a", "b")]
        for stream in lost:
            await stream.__aenter__()
        await until(lambda: house.server.num_live == 3)
        await leaving.close()
        await until(lambda: sorted(house.handler.aborted) == ["a", "b"])
        with pytest.raises(InstanceLost):
            await anext(lost[0])
        house.server.send([token("stays", 1, last=True), token("a", 1)])
        assert (await anext(kept)).token_ids == [1]


async def test_worker_loss_raises_after_what_already_arrived(house: House) -> None:
    lost: list[str] = []
    client = RpcClient(info_for(house.addresses))
    client.on_lost = lambda: lost.append("once")
    await client.connect(5.0)
    async with client.generate(request("r1")) as outputs:
        await until(lambda: house.handler.requests)
        house.server.send([token("r1", 1)])
        await house.server.close()
        assert (await anext(outputs)).token_ids == [1]
        with pytest.raises(InstanceLost, match="agg-0"):
            await anext(outputs)
    assert lost == ["once"]
    assert not client.connected
    with pytest.raises(InstanceLost):
        async with client.generate(request("r2")):
            pass
    await client.close()


# --- refusals ----------------------------------------------------------------------------------


async def refused(client: RpcClient) -> OutputStream:
    async with client.generate(request("r1")) as outputs:
        async for _ in outputs:
            pass
    return outputs


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (InvalidRequest("too long"), InvalidRequest),
        (Overloaded("full", retry_after_s=3.5), Overloaded),
        (RuntimeError("a bug"), EngineFailed),
    ],
)
async def test_refusal_ends_the_stream_with_its_error_class(
    house: House, raised: Exception, arrives: type[ServingError]
) -> None:
    client = await house.client()
    house.handler.refusal = raised
    with pytest.raises(arrives) as caught:
        await refused(client)
    assert type(caught.value) is arrives
    if isinstance(raised, Overloaded) and isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 3.5
    house.handler.refusal = None
    assert house.server.num_live == 0
    await client.ping(5.0)  # the connection is still good


async def test_request_id_of_another_frontend_is_refused(house: House) -> None:
    first, second = await house.client(), await house.client()
    async with first.generate(request("r1")) as outputs:
        await until(lambda: house.server.num_live == 1)
        with pytest.raises(InvalidRequest):
            await refused(second)
        house.server.send([token("r1", 1, last=True)])
        assert (await anext(outputs)).token_ids == [1]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("m"),
        ModelNotFound("m"),
        Overloaded("m", retry_after_s=2.0),
        NoInstances("m", retry_after_s=2.0),
        QueuedTooLong("m", retry_after_s=2.0),
        DeadlineExceeded("prefill", 2.5),
        DeadlineExceeded("first token", 2.5, setting="deadlines.first_token_s"),
        EngineFailed("m"),
    ],
)
def test_errors_survive_the_journey(error: ServingError) -> None:
    with pytest.raises(type(error)) as caught:
        raise_error(error_info(error))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("kind", ["KvTransferFailed", "InstanceLost", "SomethingNew", ""])
def test_kinds_of_other_layers_become_engine_failures(kind: str) -> None:
    with pytest.raises(EngineFailed, match="why"):
        raise_error(ErrorInfo(kind, "why"))


# --- identity, life ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"epoch": 8}, {"instance_id": "agg-1"}])
async def test_another_instance_at_the_address_is_not_accepted(
    house: House, changes: dict[str, object]
) -> None:
    with pytest.raises(InstanceLost, match="expected"):
        await house.client(**changes)


async def test_addresses_are_tried_in_order(house: House) -> None:
    assert (await house.client()).address == house.addresses[0]
    client = await house.client(rpc_addresses=["unix:/nowhere", "carrier-pigeon", *house.addresses])
    assert client.address == house.addresses[0]
    assert (await house.client(rpc_addresses=house.addresses[1:])).address.startswith("tcp://")


@asynccontextmanager
async def impostor(says: bytes) -> AsyncIterator[str]:
    """A server that says its piece, and closes when the client does; yields its address."""
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


async def test_connect_gives_up_at_its_deadline() -> None:
    async with impostor(b"") as address:
        with pytest.raises(InstanceLost, match=r"within 0\.1 s"):
            await RpcClient(info_for([address])).connect(0.1)


async def test_drain_is_announced_to_present_and_future_frontends(house: House) -> None:
    present = await house.client()
    house.server.announce_drain()
    await until(lambda: present.draining)
    future = await house.client()
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


# --- bad peers ---------------------------------------------------------------------------------


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
async def test_garbage_closes_that_connection_only(house: House, garbage: bytes) -> None:
    good = await house.client()
    reader, writer = await house.raw()
    writer.write(garbage)
    assert await closed_by_peer(reader)
    await good.ping(5.0)
    assert house.handler.requests == []
    await until(lambda: house.server.num_frontends == 1)


async def test_garbage_from_a_worker_loses_the_instance() -> None:
    async with impostor(frame(Hello(PROTOCOL_VERSION, "agg-0", 7)) + b"\xff" * 8) as address:
        with pytest.raises(InstanceLost):
            await RpcClient(info_for([address])).connect(5.0)


async def test_frontend_that_stops_reading_is_disconnected(house: House) -> None:
    reader, writer = await house.raw()
    writer.write(frame(Hello(PROTOCOL_VERSION)) + frame(Generate(request("slow"))))
    await until(lambda: house.server.num_live == 1)
    fast = await house.client()
    step = [EngineOutput("slow", list(range(1000)))] * 100
    for _ in range(200):
        house.server.send(step)
    await until(lambda: house.handler.aborted == ["slow"])
    assert house.server.num_frontends == 1
    await fast.ping(5.0)
    assert await closed_by_peer(reader)


def test_worker_messages_are_told_apart_by_their_tags() -> None:
    message = msgspec.msgpack.decode(frame(Ping(3))[4:], type=ToWorker)
    assert message == Ping(3)
