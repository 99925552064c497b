"""The control connection of a KV transfer: its messages, their framing, and nothing of the blocks.

A frame is a little-endian u32 length and that many bytes of msgpack. The pulling side speaks
first; one connection carries one pull at a time and is kept for the next one:

    -> Hello   <- Hello                      once, both with the address of their data endpoint
    -> Follow  <- Computed | Refused         waits for the prefill to get further
    -> Pull    <- Granted | Refused          Refused leaves the connection usable
       blocks, in chunks, as the transport moves them (a Refused now means: no more will come);
       or, in place, Granted says where they are, and the puller reads them there
    -> Received                              everything is where it belongs
    -> Stop   <- Stopped                     instead: no more blocks, the connection stays usable
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

import msgspec
from msgspec import Struct

WIRE_VERSION = 4
MAX_FRAME_BYTES = 64 * 1024
MAX_BLOCKS_IN_PLACE = 8192  # their ids fit into a frame
MAX_CHUNKS = 1 << 24  # a tag is 40 bits of pull and 24 bits of chunk


class SharedMemory(Struct, frozen=True):
    """Memory on a GPU of `host`, which another process there may map by `handle`.

    It is staging memory, or with `is_pool` the engine's own blocks, from `offset` on. `address` is
    where they are in the source's process, for a puller in the same one.
    """

    host: str
    process: str
    handle: bytes
    is_pool: bool = False
    offset: int = 0
    address: int = 0


class Hello(Struct, frozen=True, tag="hello"):
    """`endpoint` is the transport's own address of where blocks go; empty where there is none.

    `memory`: the puller says that its blocks are on a GPU (without a handle; with `is_pool` if it
    can read in place), and the source answers with its own memory where the two may meet.
    """

    version: int
    transport: str
    endpoint: bytes = b""
    memory: SharedMemory | None = None


class Follow(Struct, frozen=True, tag="follow"):
    """Answered when more than `beyond` blocks are computed, or the prefill is over."""

    request_id: str
    nonce: str
    beyond: int


class Computed(Struct, frozen=True, tag="computed"):
    """The first `num_blocks` can be pulled; `token` is known when these are all there will be."""

    num_blocks: int
    token: int | None = None


class Pull(Struct, frozen=True, tag="pull"):
    """Blocks `first_block .. first_block + num_blocks`, at most `chunk_blocks` at a time.

    `tag` is unique to this pull on the pulling side; chunk `i` travels under `tag + i`. With
    `on_gpu`, both ends stage in the memory that they told each other of. With `in_place`, the
    puller reads the source's pool, and the source only keeps the blocks from changing until
    Received, Stop or the end of the connection. With `more_follows`, the source keeps the blocks
    when these have arrived.
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
    """`chunk_blocks` is what both sides can stage; `route` names what carries the blocks. `blocks`,
    in place: little-endian int32 ids in the source's pool."""

    chunk_blocks: int
    route: str = ""
    blocks: bytes = b""


class Refused(Struct, frozen=True, tag="refused"):
    reason: str


class Chunk(Struct, frozen=True, tag="chunk"):
    """The bytes of chunk `index` follow on this very connection (TCP only)."""

    index: int


class ChunkAt(Struct, frozen=True, tag="chunk-at"):
    """Chunk `index` lies at `address` of `device` (-1: host memory), to be read from there (NIXL
    only). `agent` describes the source's memory, when the peer does not know all of it yet."""

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
    Hello
    | Follow
    | Computed
    | Pull
    | Granted
    | Refused
    | Chunk
    | ChunkAt
    | Received
    | Stop
    | Stopped
)
_decoder = msgspec.msgpack.Decoder(Message)


class ProtocolError(ConnectionError):
    """The peer said something that has no place here; the connection is of no more use."""


class Refusal(Exception):
    """The peer will not deliver, and says why."""


def chunk_ranges(first_block: int, num_blocks: int, chunk_blocks: int) -> list[tuple[int, int]]:
    """(first block, number of blocks) of each chunk; both sides compute the same list."""
    end = first_block + num_blocks
    return [(i, min(chunk_blocks, end - i)) for i in range(first_block, end, chunk_blocks)]


def socket_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Connection:
    """A connected socket, owned by the task that closes it. Lost and garbled alike raise
    ConnectionError (or another OSError), and after that only `close` makes sense."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        sock = socket.socket(socket_family(host), socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    @property
    def peer_host(self) -> str:
        """The address that the peer connects from, or is connected to at. Raises OSError."""
        host: str = self._sock.getpeername()[0]
        return host

    async def send(self, message: Message) -> None:
        payload = msgspec.msgpack.encode(message)
        await self._loop.sock_sendall(self._sock, len(payload).to_bytes(4, "little") + payload)

    async def receive(self) -> Message:
        """The next message. Must not be cancelled half-way and then called again."""
        header = bytearray(4)
        await self.receive_into(memoryview(header))
        size = int.from_bytes(header, "little")
        if size > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {size} bytes")
        payload = bytearray(size)
        await self.receive_into(memoryview(payload))
        try:
            message: Message = _decoder.decode(payload)
        except msgspec.DecodeError as exc:
            raise ProtocolError(str(exc)) from None
        return message

    async def send_bytes(self, data: memoryview) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def receive_into(self, data: memoryview) -> None:
        """Fill `data` completely."""
        done = 0
        while done < len(data):
            count = await self._loop.sock_recv_into(self._sock, data[done:])
            if not count:
                raise ConnectionResetError("the peer closed the connection")
            done += count

    def watch(self, ended: Callable[[], None] | None) -> None:
        """Call `ended` when the peer closes or says something while nobody uses the connection;
        with None, stop that."""
        self._loop.remove_reader(self._sock)
        if ended is not None:
            self._loop.add_reader(self._sock, ended)

    @property
    def quiet(self) -> bool:
        """Whether the peer neither closed nor said anything: how an idle connection should be."""
        poller = select.poll()  # not select(): descriptors may be above 1023
        poller.register(self._sock, select.POLLIN | select.POLLHUP)
        return self._sock.fileno() >= 0 and not poller.poll(0)

    def close(self) -> None:
        """Only when no other task uses the connection any more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
