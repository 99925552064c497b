"""What the serving half refuses, whatever the transport."""

from __future__ import annotations

from urllib.parse import urlsplit

from kv_ends import LAYOUT, Held, random_blocks, serving
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.messages import WIRE_VERSION, ChannelHello, Pull, Refused


async def test_peer_that_asks_for_gpu_memory_of_a_host_only_source_is_refused() -> None:
    async with serving("tcp", Held(a=random_blocks(4))) as source:
        address = urlsplit(source.address)
        connection = await ControlConnection.open(address.hostname or "", address.port or 0)
        try:
            await connection.send(ChannelHello(WIRE_VERSION, "tcp"))
            assert isinstance(await connection.receive(), ChannelHello)
            await connection.send(Pull("a", "n-a", LAYOUT.fingerprint, 0, 4, 4, 0, on_gpu=True))
            assert await connection.receive() == Refused("no GPU memory was offered here")
        finally:
            connection.close()
