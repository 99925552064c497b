"""A worker's KV transfers: it serves its own blocks and pulls those of its peers."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from serving.config import KvTransferConfig
from serving.errors import KvTransferFailed, OperatorError
from serving.kv_layout import KvLayout
from serving.kv_transfer.contract import BlockSource, ChunkSink, PrefillProgress
from serving.kv_transfer.gpu_memory import CudaDevice, CudaError
from serving.kv_transfer.puller import Puller
from serving.kv_transfer.server import BlockServer
from serving.kv_transfer.transport import TransferEndpoint, Transport
from serving.kv_transfer.transports import TRANSPORTS
from serving.protocol import KvTransferParams

log = logging.getLogger(__name__)

MAX_THREADS = 4  # gather and scatter are copies: a few threads saturate the memory


class KvTransfer:
    """One per worker process. The transport's library loads in `serve` or in the first pull."""

    address: str
    """What peers connect to, once serving: `ucx://host:port`, for example."""

    route = ""
    """How the blocks of the latest pull travelled, for people: `cuda_ipc`, or `tcp`."""

    def __init__(
        self,
        config: KvTransferConfig,
        layout: KvLayout,
        *,
        host: str,
        device: str = "cpu",
        transport: Transport | None = None,
        gpu: CudaDevice | None = None,
    ) -> None:
        """`device` has the engine's blocks (`cpu`, `cuda`, `cuda:1`).

        `transport` None: a new one, as `config.transport` says. `gpu` None: that of `device`.
        """
        self._config, self._layout, self._host, self._device = config, layout, host, device
        self._transport = transport or TRANSPORTS[config.transport](host, device)
        self._gpu = gpu
        self._changing = asyncio.Lock()  # starting and closing exclude each other
        self._endpoint: TransferEndpoint | None = None
        self._puller: Puller | None = None
        self._server: BlockServer | None = None
        self._closed = False

    async def serve(self, source: BlockSource) -> None:
        """Listen (on an ephemeral port of `host`) and answer pulls until `close`.

        Raises OperatorError when the transport cannot work here.
        """
        async with self._changing:
            if self._closed or self._server:
                raise RuntimeError("serve() is called once, before close()")
            endpoint = await self._start()
            server = BlockServer(source, endpoint)
            port = server.start(self._host)
            self._server = server
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.address = f"{endpoint.transport.scheme}://{host}:{port}"

    async def progress(
        self, params: KvTransferParams, beyond: int, within_s: float
    ) -> PrefillProgress:
        """Wait until a prefill has computed more than `beyond` blocks, or has ended.

        Raises KvTransferFailed, also when neither happened `within_s`. Cancellable.
        """
        puller = await self._started(params)
        return await puller.progress(params, beyond, within_s)

    async def pull(
        self,
        params: KvTransferParams,
        first_block: int,
        num_blocks: int,
        sink: ChunkSink,
        *,
        more_follows: bool = False,
    ) -> int:
        """Fetch `num_blocks` from `first_block` on; returns the bytes received.

        Gather, transport and scatter of consecutive chunks overlap. Afterwards the source may
        release the blocks, unless `more_follows`; a pull of no blocks does nothing else. Raises
        KvTransferFailed on refusal, loss, or when `connect_s` or `transfer_s` ran out; `sink` is not
        called after that. Cancellable.
        """
        puller = await self._started(params)
        num_bytes = await puller.pull(
            params, first_block, num_blocks, sink, more_follows=more_follows
        )
        self.route = puller.route
        return num_bytes

    async def close(self) -> None:
        """Close listener, channels and staging memory; pulls under way fail."""
        self._closed = True
        async with self._changing:
            if self._puller:
                await self._puller.close()
            if self._server:
                await self._server.close()
            if self._endpoint:
                endpoint, self._endpoint = self._endpoint, None
                await endpoint.transport.close()
                endpoint.threads.shutdown()

    async def _started(self, params: KvTransferParams) -> Puller:
        if self._puller is None:
            async with self._changing:
                try:
                    await self._start()
                except (OperatorError, RuntimeError) as exc:
                    raise KvTransferFailed(
                        params.request_id, params.source_instance, str(exc)
                    ) from exc
        assert self._puller
        return self._puller

    async def _start(self) -> TransferEndpoint:
        if self._closed:
            raise RuntimeError("this endpoint is closed")
        if self._endpoint is None:
            gpu = self._gpu or _open_gpu(self._device)  # first: the library looks for a device
            self._endpoint = TransferEndpoint(
                config=self._config,
                layout=self._layout,
                transport=self._transport,
                transport_address=await self._transport.start(),
                gpu=gpu,
                threads=ThreadPoolExecutor(
                    min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="kv-transfer"
                ),
            )
            self._puller = Puller(self._endpoint)
        return self._endpoint


def _open_gpu(device: str) -> CudaDevice | None:
    kind, _, ordinal = device.partition(":")
    if kind != "cuda":
        return None
    try:
        gpu = CudaDevice(int(ordinal or 0))
        gpu.use()
    except CudaError as exc:
        log.warning("KV travels through host memory that is not pinned: %s", exc)
        return None
    return gpu
