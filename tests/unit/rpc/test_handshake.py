"""Only who knows the secret is listened to, and only who knows it is spoken to."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from serving.errors import InstanceLost
from serving.protocol import (
    PROTOCOL_VERSION,
    EngineRequest,
    Hello,
    InstanceInfo,
    ModelCard,
    Ping,
    Proof,
)
from serving.rpc import RpcClient, RpcServer
from serving.rpc import server as server_module
from serving.rpc.handshake import frontend_proof, read_secret, worker_proof

SECRET = b"of this deployment"


class Deaf:
    """A worker that must not be reached by strangers."""

    def on_generate(self, request: EngineRequest) -> None:
        raise AssertionError("a stranger reached the worker")

    def on_abort(self, request_id: str) -> None:
        raise AssertionError("a stranger reached the worker")

    on_release = on_abort


@pytest.fixture
async def worker() -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer(Deaf(), "agg-0", 7, secret=SECRET)
    yield server, (await server.start("127.0.0.1"))[0]
    await server.close()


def info_at(address: str) -> InstanceInfo:
    return InstanceInfo(
        instance_id="agg-0",
        epoch=7,
        role="agg",
        rpc_addresses=[address],
        kv_address="",
        model=ModelCard("m", "d", 64, 16, "salt", "f", 0),
        num_blocks=1,
        max_batch_size=1,
        pid=1,
        host="h",
    )


def frame(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def hello_of(reader: asyncio.StreamReader) -> Hello:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgspec.msgpack.decode(await reader.readexactly(size), type=Hello)


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the worker hangs up without another word."""
    try:
        async with asyncio.timeout(3):
            return await reader.read() == b""
    except ConnectionError:
        return True


async def test_who_knows_the_secret_is_served(worker: tuple[RpcServer, str]) -> None:
    client = RpcClient(info_at(worker[1]), secret=SECRET)
    await client.connect()
    assert await client.ping(2.0) < 2.0
    await client.close()


async def test_client_with_another_secret_does_not_connect(worker: tuple[RpcServer, str]) -> None:
    with pytest.raises(InstanceLost, match="does not know the secret"):
        await RpcClient(info_at(worker[1]), secret=b"of another one").connect()
    with pytest.raises(InstanceLost, match="asks for a secret"):
        await RpcClient(info_at(worker[1])).connect()


async def test_client_does_not_speak_to_a_worker_without_the_secret() -> None:
    server = RpcServer(Deaf(), "agg-0", 7)
    address = (await server.start("127.0.0.1"))[0]
    with pytest.raises(InstanceLost, match="does not know the secret"):
        await RpcClient(info_at(address), secret=SECRET).connect()
    await server.close()


@pytest.mark.parametrize("second", [Ping(1), Proof(b""), Proof(b"x" * 32), Hello(PROTOCOL_VERSION)])
async def test_stranger_is_disconnected_unanswered(
    worker: tuple[RpcServer, str], second: object
) -> None:
    reader, writer = await dial(worker[1])
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    await hello_of(reader)
    writer.write(frame(second) + frame(Ping(2)))
    assert await closed(reader)
    writer.close()
    assert worker[0].num_frontends == 0


async def test_proof_of_another_connection_or_of_the_other_side_does_not_count(
    worker: tuple[RpcServer, str],
) -> None:
    asked = Hello(PROTOCOL_VERSION, nonce=b"always the same")
    first_reader, first_writer = await dial(worker[1])
    first_writer.write(frame(asked))
    first = await hello_of(first_reader)
    for make in (
        lambda answer: frontend_proof(SECRET, asked, first),
        lambda answer: worker_proof(SECRET, asked, answer),
        lambda answer: answer.proof,
    ):
        reader, writer = await dial(worker[1])
        writer.write(frame(asked))
        writer.write(frame(Proof(make(await hello_of(reader)))) + frame(Ping(1)))
        assert await closed(reader)
        writer.close()
    first_writer.close()


async def test_stranger_who_draws_it_out_is_disconnected(
    worker: tuple[RpcServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "GREET_S", 0.05)
    reader, writer = await dial(worker[1])
    assert await closed(reader)
    writer.close()


async def test_stranger_cannot_fill_memory(worker: tuple[RpcServer, str]) -> None:
    reader, writer = await dial(worker[1])
    writer.write((32 << 20).to_bytes(4, "little") + b"x" * 100_000)
    assert await closed(reader)
    writer.close()


async def test_frontend_learns_of_a_drain_only_once_it_is_known(
    worker: tuple[RpcServer, str],
) -> None:
    server, address = worker
    server.announce_drain()
    reader, writer = await dial(address)
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    await hello_of(reader)
    server.announce_drain()
    writer.write(frame(Proof(b"wrong")))
    assert await closed(reader)
    writer.close()
    client = RpcClient(info_at(address), secret=SECRET)
    await client.connect()
    await client.ping(2.0)
    assert client.draining
    await client.close()


def test_secret_that_can_be_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("x\n")
    with pytest.raises(ValueError, match="shorter"):
        read_secret(str(tmp_path / "short"))
    with pytest.raises(OSError, match="No such file"):
        read_secret(str(tmp_path / "absent"))
    assert read_secret("") == b""
