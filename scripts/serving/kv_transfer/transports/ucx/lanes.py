"""Asks UCX itself which transports an endpoint uses, because ucxx has no call for it."""

from __future__ import annotations

import ctypes

_MAX_LANES = 16
_FIELD_TRANSPORTS = 1 << 3


class _Entry(ctypes.Structure):
    _fields_ = [("transport", ctypes.c_char_p), ("device", ctypes.c_char_p)]


class _Attributes(ctypes.Structure):
    """`ucp_ep_attr_t`; UCX reads and writes only the fields that the mask names."""

    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    ]


def lanes(endpoint: int) -> list[str]:
    """`transport/device` of each lane of a `ucp_ep_h`; empty where UCX does not answer."""
    try:
        ucp = ctypes.CDLL("libucp.so.0")  # the one that ucxx has loaded
    except OSError:
        return []
    entries = (_Entry * _MAX_LANES)()
    attributes = _Attributes(
        field_mask=_FIELD_TRANSPORTS,
        entries=entries,
        num_entries=_MAX_LANES,
        entry_size=ctypes.sizeof(_Entry),
    )
    if ucp.ucp_ep_query(ctypes.c_void_p(endpoint), ctypes.byref(attributes)) != 0:
        return []
    used = (entries[i] for i in range(attributes.num_entries))
    return sorted({f"{lane.transport.decode()}/{lane.device.decode()}" for lane in used})
