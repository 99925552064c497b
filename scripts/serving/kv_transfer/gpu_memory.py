"""GPU memory that another process of this host can map, and pinned host memory.

This is the only module that knows libcuda. It calls the driver itself (`ctypes`) for two reasons:
torch's allocator may return memory that cannot be shared (`expandable_segments`), and no library
that is always installed can find out whether a peer's memory can be mapped here. The answer decides
between a copy from GPU to GPU and a copy through the host.
"""

from __future__ import annotations

import ctypes
import functools
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_SUCCESS, _ALREADY_MAPPED = 0, 208
_IPC_LAZY_PEER_ACCESS = 1
_HOST_PORTABLE = 1
HANDLE_BYTES = 64


class CudaError(Exception):
    """The driver refused a call; the text names the call and the reason."""


@functools.cache
def this_process() -> str:
    """An identity that does not repeat, unlike process ids in different containers."""
    return secrets.token_hex(16)


class _IpcHandle(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_ubyte * HANDLE_BYTES)]


class GpuBuffer:
    """Bytes on a GPU. Slices share the memory, which is freed when the last of them is gone.

    torch and ucxx accept it through `__cuda_array_interface__`.
    """

    __slots__ = ("__weakref__", "_owner", "address", "device", "nbytes")

    def __init__(
        self, address: int, nbytes: int, device: int, owner: GpuBuffer | None = None
    ) -> None:
        self.address, self.nbytes, self.device = address, nbytes, device
        self._owner = owner

    def __getitem__(self, part: slice) -> GpuBuffer:
        start, stop, step = part.indices(self.nbytes)
        if step != 1:
            raise ValueError("only contiguous parts")
        return GpuBuffer(self.address + start, max(0, stop - start), self.device, self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 2,
        }


class Mapping:
    """Another process's memory, mapped at `address` of this one until nobody refers to this object.

    The memory stays allocated until then, even if its process has ended.
    """

    __slots__ = ("__weakref__", "address")

    def __init__(self, address: int) -> None:
        self.address = address


class CudaDevice:
    """One GPU, by its ordinal among the visible ones, as `process` uses it. Safe from any thread."""

    def __init__(self, ordinal: int, library: str = "libcuda.so.1") -> None:
        """Raises CudaError when there is no driver or no such device."""
        self.ordinal, self.process = ordinal, this_process()
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as exc:
            raise CudaError(f"no CUDA driver: {exc}") from exc
        self._call("cuInit", ctypes.c_uint(0))
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._context = ctypes.c_void_p()
        # torch uses the same context. It is held until the process ends.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def use(self) -> None:
        """Make this the calling thread's device, for libraries that expect one. Raises CudaError."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int) -> GpuBuffer:
        """A new allocation, which can be exported. Raises CudaError."""
        address = ctypes.c_uint64()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        buffer = GpuBuffer(address.value, nbytes, self.ordinal)
        # Not at exit: the driver is gone by then, and so is the memory.
        weakref.finalize(buffer, self._free, address.value).atexit = False
        return buffer

    def export(self, buffer: GpuBuffer) -> bytes:
        """A handle by which another process maps the allocation. Raises CudaError."""
        handle = _IpcHandle()
        with self._current():
            address = ctypes.c_uint64(buffer.address)
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def export_at(self, address: int) -> tuple[bytes, int]:
        """A handle of the allocation that holds `address`, and the offset of `address` in it, in bytes.

        Raises CudaError, for example for memory that is mapped in pieces.
        """
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._current():
            self._call(
                "cuMemGetAddressRange_v2",
                ctypes.byref(base),
                ctypes.byref(size),
                ctypes.c_uint64(address),
            )
        whole = GpuBuffer(base.value, size.value, self.ordinal)
        return self.export(whole), address - base.value

    def map(self, handle: bytes, offset: int) -> Mapping:
        """Map memory that another process exported; the mapping begins `offset` bytes into it.

        Raises CudaError when it cannot be mapped here.
        """
        address = ctypes.c_uint64()
        with self._current():
            self._check("cuIpcOpenMemHandle", self._open(address, handle))
        mapping = Mapping(address.value + offset)
        weakref.finalize(mapping, self._unmap, address.value).atexit = False
        return mapping

    def try_to_map(self, handle: bytes) -> None:
        """Raises CudaError when memory that another process exported cannot be mapped here."""
        address = ctypes.c_uint64()
        with self._current():
            result = self._open(address, handle)
            if result == _ALREADY_MAPPED:
                return
            self._check("cuIpcOpenMemHandle", result)
            self._call("cuIpcCloseMemHandle", address)

    def _open(self, address: ctypes.c_uint64, handle: bytes) -> int:
        result: int = self._cuda.cuIpcOpenMemHandle_v2(
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            ctypes.c_uint(_IPC_LAZY_PEER_ACCESS),
        )
        return result

    def _unmap(self, address: int) -> None:
        with self._current():
            self._cuda.cuIpcCloseMemHandle(ctypes.c_uint64(address))

    def pin(self, pages: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Page-lock host memory until the array is gone. Copies to and from the GPU become faster and
        need no synchronisation in between. Raises CudaError."""
        address = ctypes.c_void_p(pages.ctypes.data)
        flags = ctypes.c_uint(_HOST_PORTABLE)
        with self._current():
            size = ctypes.c_size_t(pages.nbytes)
            self._call("cuMemHostRegister_v2", address, size, flags)
        weakref.finalize(pages, self._unpin, pages.ctypes.data).atexit = False

    def _free(self, address: int) -> None:
        with self._current():
            self._cuda.cuMemFree_v2(ctypes.c_uint64(address))

    def _unpin(self, address: int) -> None:
        with self._current():
            self._cuda.cuMemHostUnregister(ctypes.c_void_p(address))

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._cuda, name)(*arguments))

    def _check(self, name: str, result: int) -> None:
        if result != _SUCCESS:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text))
            why = (text.value or b"unknown error").decode(errors="replace")
            raise CudaError(f"{name}: {why} ({result})")
