"""Moving KV blocks between workers, over UCX, NIXL or plain TCP.

The decode worker pulls. It names a request by id and nonce, which the prefill worker gave to the
frontend; the prefill worker answers with exactly the blocks asked for, or refuses.

    contract.py       what a worker provides to be pulled from, and what it gets
    transfer.py       KvTransfer: one per worker, serves its own blocks and pulls from peers
    puller.py         the decode half; channel_pool.py keeps its connections
    server.py         the prefill half; sender.py sends the chunks
    messages.py       the control connection's messages; control.py the connection itself
    transport.py      what a transport must do; transports/ has one file (or folder) for each
    peer_memory.py    which memory two workers can share; gpu_memory.py asks the CUDA driver
    staging.py        the memory that chunks pass through
"""

from serving.kv_transfer.contract import BlockSource, ChunkSink, PrefillProgress
from serving.kv_transfer.transfer import KvTransfer

__all__ = ["BlockSource", "ChunkSink", "KvTransfer", "PrefillProgress"]
