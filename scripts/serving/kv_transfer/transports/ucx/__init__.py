"""KV blocks over UCX: one tagged message per chunk, several under way.

Only the source has a UCX endpoint, one for each peer. It makes the endpoint from the worker address
in the peer's ChannelHello, and only after the peer proved with a nonce that it may pull: UCX itself
authenticates nobody. Its port admits peers that proved that, the sources that this worker pulls
from, and processes of this machine. The control connections stay beside it, because they report a
dead peer at once and cost nothing while idle.

UCX can withdraw a message only by closing the endpoint, which ends the messages of all pulls on it.
So a pull that ends early settles its own messages. The source reports how many chunks it sent; the
puller receives those and drops them. It satisfies the receives whose chunks will not come with
messages of this process to itself. One endpoint for each pull would not help: UCX pairs the
endpoints of both workers by order of creation, so closing one can end another pull's.

    channel.py        the messages of one pull at a time
    endpoints.py      the endpoints of one worker
    context.py        UCX in this process; the only module that knows `ucxx`
    options.py        settings and addresses
    guarded_ports.py  closes UCX's ports to strangers
    lanes.py          asks UCX which transports an endpoint uses
"""

from __future__ import annotations

import logging

from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.messages import ChannelHello
from serving.kv_transfer.transport import TransferChannel, Transport
from serving.kv_transfer.transports.ucx.channel import UcxChannel
from serving.kv_transfer.transports.ucx.context import UcxContext
from serving.kv_transfer.transports.ucx.endpoints import UcxEndpoints
from serving.kv_transfer.transports.ucx.options import GPU_TRANSPORTS

log = logging.getLogger(__name__)


class UcxTransport(Transport):
    scheme = "ucx"

    def __init__(self, host: str, device: str = "cpu") -> None:
        self._host, self._on_gpu = host, device != "cpu"
        self._endpoints: UcxEndpoints

    async def start(self) -> bytes:
        context = await UcxContext.acquire(self._host, self._on_gpu)
        self._endpoints = UcxEndpoints(context)
        if self._on_gpu:
            missing = GPU_TRANSPORTS - context.transports
            self.moves_gpu_memory = not missing
            if missing:
                log.warning(
                    "KV travels through host memory: UCX has no %s here (of %s)",
                    " and no ".join(sorted(missing)),
                    ", ".join(sorted(context.transports)),
                )
        return context.address

    def channel(self, connection: ControlConnection, peer: ChannelHello) -> TransferChannel:
        return UcxChannel(connection, self._endpoints, peer)

    async def close(self) -> None:
        await self._endpoints.close()
