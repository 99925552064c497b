"""Frontends and workers serve only peers that prove to know the secret."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from serving.errors import InstanceLost
from serving.framing import frame
from serving.protocol import (
    PROTOCOL_VERSION,
    Hello,
    Proof,
    ReleaseKv,
)
from serving.rpc import RpcClient, RpcServer
from serving.rpc.handshake import frontend_proof, read_secret, worker_proof
from serving.rpc.server import HANDSHAKE_S
from unit.rpc.rpc_rig import Recorder, info_for, read_frame
from waiting import until

SECRET = b"of this deployment"


class Worker:
    """A listening server with a secret, and what reached its handler."""

    def __init__(self, secret: bytes = SECRET, handshake_s: float = HANDSHAKE_S) -> None:
        self.handler = Recorder()
        self.server = RpcServer(self.handler, "agg-0", 7, secret=secret, handshake_s=handshake_s)
        self.address = ""

    async def __aenter__(self) -> "Worker":
        self.address = (await self.server.start("127.0.0.1"))[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    def client(self, secret: bytes = b"") -> RpcClient:
        return RpcClient(info_for([self.address]), secret=secret)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with Worker() as worker:
        yield worker


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def hello_of(reader: asyncio.StreamReader) -> Hello:
    hello = await read_frame(reader)
    assert isinstance(hello, Hello)
    return hello


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the worker hangs up without another word."""
    try:
        async with asyncio.timeout(3):
            return await reader.read() == b""
    except ConnectionError:
        return True


async def test_client_with_the_secret_is_served(worker: Worker) -> None:
    client = worker.client(SECRET)
    await client.connect()
    client.release("r")
    await until(lambda: worker.handler.released == ["r"])
    await client.close()


async def test_client_with_another_secret_does_not_connect(worker: Worker) -> None:
    with pytest.raises(InstanceLost, match="does not know the secret"):
        await worker.client(b"of another one").connect()
    with pytest.raises(InstanceLost, match="asks for a secret"):
        await worker.client().connect()


async def test_client_does_not_speak_to_a_worker_without_the_secret() -> None:
    async with Worker(secret=b"") as worker:
        with pytest.raises(InstanceLost, match="does not know the secret"):
            await worker.client(SECRET).connect()


@pytest.mark.parametrize(
    "second", [ReleaseKv("r"), Proof(b""), Proof(b"x" * 32), Hello(PROTOCOL_VERSION)]
)
async def test_peer_without_a_proof_is_disconnected_without_an_answer(
    worker: Worker, second: object
) -> None:
    reader, writer = await dial(worker.address)
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    await hello_of(reader)
    writer.write(frame(second) + frame(ReleaseKv("r")))
    assert await closed(reader)
    writer.close()
    assert worker.handler.released == []


async def test_proof_of_another_connection_or_of_the_worker_is_refused(
    worker: Worker,
) -> None:
    asked = Hello(PROTOCOL_VERSION, nonce=b"always the same")
    first_reader, first_writer = await dial(worker.address)
    first_writer.write(frame(asked))
    first = await hello_of(first_reader)
    for make in (
        lambda answer: frontend_proof(SECRET, asked, first),
        lambda answer: worker_proof(SECRET, asked, answer),
        lambda answer: answer.proof,
    ):
        reader, writer = await dial(worker.address)
        writer.write(frame(asked))
        writer.write(frame(Proof(make(await hello_of(reader)))) + frame(ReleaseKv("r")))
        assert await closed(reader)
        writer.close()
    first_writer.close()


async def test_slow_handshake_is_disconnected_at_its_deadline() -> None:
    async with Worker(handshake_s=0.05) as worker:
        reader, writer = await dial(worker.address)
        assert await closed(reader)
        writer.close()


async def test_unfinished_message_before_the_handshake_is_limited(worker: Worker) -> None:
    reader, writer = await dial(worker.address)
    writer.write((32 << 20).to_bytes(4, "little") + b"x" * 100_000)
    assert await closed(reader)
    writer.close()


async def test_drain_is_announced_only_after_the_handshake(
    worker: Worker,
) -> None:
    worker.server.announce_drain()
    reader, writer = await dial(worker.address)
    writer.write(frame(Hello(PROTOCOL_VERSION)))
    await hello_of(reader)
    worker.server.announce_drain()
    writer.write(frame(Proof(b"wrong")))
    assert await closed(reader)
    writer.close()
    client = worker.client(SECRET)
    await client.connect()
    await until(lambda: client.draining)
    await client.close()


def test_secret_that_can_be_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("x\n")
    with pytest.raises(ValueError, match="shorter"):
        read_secret(str(tmp_path / "short"))
    with pytest.raises(OSError, match="No such file"):
        read_secret(str(tmp_path / "absent"))
    assert read_secret("") == b""
