"""A KvTransfer made of the two halves and of a carrier."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor

from serving.errors import KvTransferFailed, OperatorError
from serving.kv_layout import KvLayout
from serving.kv_transfer.base import BlockSource, ChunkSink, KvTransfer, Progress
from serving.kv_transfer.gpu_memory import CudaError, Gpu
from serving.kv_transfer.link import Carrier, Side
from serving.kv_transfer.pull import Puller
from serving.kv_transfer.server import BlockServer
from serving.protocol import KvTransferParams

log = logging.getLogger(__name__)

MAX_THREADS = 4  # gather and scatter are copies: a few threads saturate the memory


class LinkedTransfer(KvTransfer):
    """Everything but the way of the blocks, which the carrier decides."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        host: str,
        chunk_bytes: int | None,
        connect_s: float,
        transfer_s: float,
        device: str = "cpu",
        in_place: bool = True,
    ) -> None:
        super().__init__(
            layout,
            host=host,
            chunk_bytes=chunk_bytes,
            connect_s=connect_s,
            transfer_s=transfer_s,
            device=device,
            in_place=in_place,
        )
        self._changing = asyncio.Lock()  # starting and closing exclude each other
        self._side: Side | None = None
        self._puller: Puller | None = None
        self._server: BlockServer | None = None
        self._closed = False

    @abstractmethod
    def _carrier(self) -> Carrier:
        """The way of the blocks, not started yet."""

    async def serve(self, source: BlockSource) -> None:
        """See `KvTransfer.serve`. Raises OperatorError when the transport cannot work here."""
        async with self._changing:
            if self._closed or self._server:
                raise RuntimeError("serve() is called once, before close()")
            side = await self._start()
            server = BlockServer(source, side)
            port = server.start(self.host)
            self._server = server
            host = f"[{self.host}]" if ":" in self.host else self.host
            self.address = f"{side.carrier.scheme}://{host}:{port}"

    async def progress(self, params: KvTransferParams, beyond: int, within_s: float) -> Progress:
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
        puller = await self._started(params)
        num_bytes = await puller.pull(
            params, first_block, num_blocks, sink, more_follows=more_follows
        )
        self.route = puller.route
        return num_bytes

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

    async def close(self) -> None:
        self._closed = True
        async with self._changing:
            if self._puller:
                await self._puller.close()
            if self._server:
                await self._server.close()
            if self._side:
                side, self._side = self._side, None
                await side.carrier.close()
                side.threads.shutdown()

    async def _start(self) -> Side:
        if self._closed:
            raise RuntimeError("this side is closed")
        if self._side is None:
            gpu = self._gpu()  # before the carrier starts: its library looks for a device
            carrier = self._carrier()
            self._side = Side(
                carrier=carrier,
                endpoint=await carrier.start(),
                layout=self.layout,
                chunk_bytes=self.chunk_bytes,
                gpu=gpu,
                threads=ThreadPoolExecutor(
                    min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="kv-transfer"
                ),
                connect_s=self.connect_s,
                transfer_s=self.transfer_s,
                in_place=self.in_place,
            )
            self._puller = Puller(self._side)
        return self._side

    def _gpu(self) -> Gpu | None:
        kind, _, ordinal = self.device.partition(":")
        if kind != "cuda":
            return None
        try:
            gpu = Gpu(int(ordinal or 0))
            gpu.use()
        except CudaError as exc:
            log.warning("KV travels through host memory that is not pinned: %s", exc)
            return None
        return gpu
