"""Closes UCX's own TCP ports to everybody but known workers.

UCX authenticates nobody, and garbage at its port is not harmless: see "More than one machine" in
docs/decisions.md. A classic BPF filter on its listening sockets needs no help from UCX. With it, the
kernel drops packets of strangers before there is a connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ADDRESSES = 512
"""Beyond that, the oldest are forgotten. The kernel accepts filters of up to 20 KiB."""

# linux/filter.h
_SO_ATTACH_FILTER = 26
_LOAD_WORD, _JUMP_IF_EQUAL, _JUMP, _RETURN = 0x20, 0x15, 0x05, 0x06
_SOURCE_ADDRESS = -0x100000 + 12  # in the IPv4 header: SKF_NET_OFF and its offset
_WHOLE_PACKET, _NOTHING = 0xFFFFFFFF, 0
_STEP_BYTES = 8


class GuardedPorts:
    """The IPv4 sockets that a library listens on in this process, open only to admitted addresses.

    This object keeps descriptor numbers only. A duplicate descriptor would hold the port open, and
    stay in the library's epoll set, after the library closed its own. A connection keeps the filter
    under which it was accepted, so forgetting an address ends no connection.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, int] = {}  # descriptor: inode
        self._addresses: dict[bytes, None] = {}  # in the order of `admit`

    def opened_by(self, opens: Callable[[], T]) -> T:
        """Call `opens`, and guard the ports that it opened."""
        before = _open_sockets()
        result = opens()
        self._sockets |= {n: i for n, i in _open_sockets().items() if before.get(n) != i}
        self._attach()
        return result

    @property
    def ports(self) -> list[int]:
        """The guarded ports."""
        with self._listening() as sockets:
            return [listener.getsockname()[1] for listener in sockets]

    def admit(self, hosts: Iterable[str]) -> None:
        """Accept connections from these IPv4 addresses. Anything else in `hosts` is ignored."""
        known = set(self._addresses)
        for host in hosts:
            with contextlib.suppress(ValueError):
                packed = ipaddress.IPv4Address(host).packed
                self._addresses.pop(packed, None)
                self._addresses[packed] = None
        while len(self._addresses) > MAX_ADDRESSES:
            del self._addresses[next(iter(self._addresses))]
        if set(self._addresses) != known:
            self._attach()

    def _attach(self) -> None:
        steps = filter_for(self._addresses)
        program = ctypes.create_string_buffer(steps, len(steps))
        argument = struct.pack("@HP", len(steps) // _STEP_BYTES, ctypes.addressof(program))
        with self._listening() as sockets:
            for listener in sockets:
                try:
                    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
                except OSError as exc:
                    port = listener.getsockname()[1]
                    log.warning("UCX's port %d is open to everybody: %s", port, exc)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[list[socket.socket]]:
        """The sockets that listen for IPv4, under temporary descriptors of their own."""
        with contextlib.ExitStack() as stack:
            found = []
            still = _open_sockets()
            for number in (n for n, inode in self._sockets.items() if still.get(n) == inode):
                duplicate = stack.enter_context(socket.socket(fileno=os.dup(number)))
                if duplicate.family == socket.AF_INET and duplicate.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                ):
                    found.append(duplicate)
            yield found


def filter_for(addresses: Iterable[bytes]) -> bytes:
    """Classic BPF, 8 bytes an instruction, that keeps IPv4 packets from these addresses.

    `addresses` are packed, in network order.
    """
    steps = [_step(_LOAD_WORD, value=_SOURCE_ADDRESS & 0xFFFFFFFF)]
    for packed in addresses:
        steps.append(_step(_JUMP_IF_EQUAL, 0, 1, int.from_bytes(packed)))
        steps.append(_step(_RETURN, value=_WHOLE_PACKET))
    return b"".join([*steps, _step(_RETURN, value=_NOTHING)])


def _step(code: int, if_true: int = 0, if_false: int = 0, value: int = 0) -> bytes:
    return struct.pack("@HBBI", code, if_true, if_false, value)


def _open_sockets() -> dict[int, int]:
    """The inode of each socket of this process by its descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found
