"""The messages of a control connection. They describe blocks; blocks travel beside them.

The pulling half speaks first. A connection serves one pull at a time and is kept for the next one:

    -> ChannelHello  <- ChannelHello         once; both carry the address of their transport
    -> Follow        <- Computed | Refused   wait until the prefill has computed more blocks
    -> Pull          <- Granted | Refused    after Refused the connection stays usable
       Then the transport moves the blocks in chunks. Refused, at this point, ends them early.
       For a pull in place, Granted names the blocks, and the puller reads them in the source's pool.
    -> Received                              the puller has scattered all blocks
    -> Stop          <- Stopped              instead: send no more; the connection stays usable
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

WIRE_VERSION = 4
MAX_BLOCKS_IN_PLACE = 8192  # their ids fit into a frame
MAX_CHUNKS = 1 << 24  # a tag has 40 bits for the pull and 24 bits for the chunk


class MemoryOffer(Struct, frozen=True):
    """GPU memory of `host` that another process there may map by `handle`.

    The memory is for staging. With `is_pool`, it is the engine's own pool, which begins at `offset`.
    `address` is where the pool lies in the source's process, for a puller in the same process.
    """

    host: str
    process: str
    handle: bytes
    is_pool: bool = False
    offset: int = 0
    address: int = 0


class ChannelHello(Struct, frozen=True, tag="hello"):
    """`endpoint` is the address of the sender's transport; empty where the transport needs none.

    A puller whose blocks lie on a GPU sends a `memory` without a handle, with `is_pool` if it can
    read in place. The source answers with its own memory if the two processes can share it.
    """

    version: int
    transport: str
    endpoint: bytes = b""
    memory: MemoryOffer | None = None


class Follow(Struct, frozen=True, tag="follow"):
    """Answered when more than `beyond` blocks are computed, or the prefill has ended."""

    request_id: str
    nonce: str
    beyond: int


class Computed(Struct, frozen=True, tag="computed"):
    """The first `num_blocks` can be pulled. `token` is set once there will be no more."""

    num_blocks: int
    token: int | None = None


class Pull(Struct, frozen=True, tag="pull"):
    """Blocks `first_block .. first_block + num_blocks`, in chunks of at most `chunk_blocks`.

    `tag` is unique to this pull on the pulling half; chunk `i` travels under `tag + i`. With
    `on_gpu`, both ends stage in the GPU memory that they offered to each other. With `in_place`, the
    puller reads the source's pool; the source only keeps the blocks from changing until Received,
    Stop or the end of the connection. With `more_follows`, the source holds the blocks afterwards.
    """

    request_id: str
    nonce: str
    layout: str
    first_block: int
    num_blocks: int
    chunk_blocks: int
    tag: int
    on_gpu: bool = False
    in_place: bool = False
    more_follows: bool = False


class Granted(Struct, frozen=True, tag="granted"):
    """`chunk_blocks` is what both ends can stage; `route` names how the blocks travel.

    For a pull in place, `blocks` has little-endian int32 ids of blocks in the source's pool.
    """

    chunk_blocks: int
    route: str = ""
    blocks: bytes = b""


class Refused(Struct, frozen=True, tag="refused"):
    reason: str


class InlineChunk(Struct, frozen=True, tag="chunk"):
    """The bytes of chunk `index` follow on this very connection (TCP only)."""

    index: int


class ChunkAt(Struct, frozen=True, tag="chunk-at"):
    """Chunk `index` can be read at `address` of `device` (-1: host memory) (NIXL only).

    `agent` describes the source's memory, when the puller does not know all of it yet.
    """

    index: int
    address: int
    num_bytes: int
    device: int
    agent: bytes = b""


class Received(Struct, frozen=True, tag="received"):
    pass


class Stop(Struct, frozen=True, tag="stop"):
    pass


class Stopped(Struct, frozen=True, tag="stopped"):
    """The first `num_chunks` chunks were sent, or are on their way."""

    num_chunks: int


Message = (
    ChannelHello
    | Follow
    | Computed
    | Pull
    | Granted
    | Refused
    | InlineChunk
    | ChunkAt
    | Received
    | Stop
    | Stopped
)
decode_message = msgspec.msgpack.Decoder(Message).decode


class Refusal(Exception):
    """The source refuses to deliver; the text is its reason."""


def chunk_ranges(first_block: int, num_blocks: int, chunk_blocks: int) -> list[tuple[int, int]]:
    """(first block, number of blocks) of each chunk; both ends compute the same list."""
    end = first_block + num_blocks
    return [(i, min(chunk_blocks, end - i)) for i in range(first_block, end, chunk_blocks)]
