"""A server with its handler, clients and raw peers, over real loopback sockets."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    InstanceInfo,
    ModelCard,
    SamplingParams,
    ToFrontend,
)
from serving.rpc import RpcClient, RpcServer
from waiting import until

CARD = ModelCard("model", "dir", 128, 16, "salt", "fingerprint", 0)


def info_for(addresses: list[str], *, epoch: int = 7, instance_id: str = "agg-0") -> InstanceInfo:
    return InstanceInfo(instance_id, epoch, "agg", addresses, "", CARD, 10, 4, os.getpid(), "here")


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id, [1, 2, 3], 3, SamplingParams(max_tokens=4))


def token(request_id: str, token_id: int, *, last: bool = False) -> EngineOutput:
    return EngineOutput(request_id, [token_id], "length" if last else None)


class Recorder:
    """An RpcHandler that records its calls. It refuses requests with `refusal`, if that is set."""

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


class RpcRig:
    """One server and the peers that are connected to it; closed by the fixture."""

    def __init__(self, handler: Recorder, server: RpcServer, addresses: list[str]) -> None:
        self.handler, self.server, self.addresses = handler, server, addresses
        self.cleanup: list[Callable[[], Awaitable[None]]] = []

    async def client(self, **changes: object) -> RpcClient:
        info = msgspec.structs.replace(info_for(self.addresses), **changes)
        client = RpcClient(info)
        await client.connect(5.0)
        self.cleanup.append(client.close)
        return client

    async def round_trip(self, client: RpcClient) -> None:
        """Wait until both ends have read all that the other one sent before."""
        async with client.generate(request("round-trip")) as outputs:
            await until(lambda: any(r.request_id == "round-trip" for r in self.handler.requests))
            self.handler.requests.pop()
            self.server.send([token("round-trip", 0, last=True)])
            assert [output.token_ids async for output in outputs] == [[0]]

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


async def read_frame(reader: asyncio.StreamReader) -> ToFrontend:
    size = int.from_bytes(await reader.readexactly(4), "little")
    return msgspec.msgpack.decode(await reader.readexactly(size), type=ToFrontend)


async def closed_by_peer(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        with suppress(ConnectionResetError):
            while await reader.read(65536):
                pass
    return True


@asynccontextmanager
async def running_rig(tmp_path: Path) -> AsyncIterator[RpcRig]:
    handler = Recorder()
    server = RpcServer(handler, "agg-0", 7, stall_s=0.2)
    rig = RpcRig(handler, server, await server.start("127.0.0.1", str(tmp_path / "w.sock")))
    yield rig
    for close in reversed(rig.cleanup):
        await close()
    await server.close()
