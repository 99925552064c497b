"""The NVIDIA GPUs of this machine, as the driver's management library (NVML) describes them.

Looking starts no CUDA context and holds no GPU memory. `pynvml` (package `nvidia-ml-py`) is loaded
on first use; it needs no driver to be installed. Which worker gets which GPU is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from msgspec import Struct

Links = frozenset[frozenset[int]]
"""Pairs of GPU indices with NVLink between them."""

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


class Gpu(Struct, frozen=True):
    """One GPU. Sizes in bytes, and `capability` 90 for 9.0; 0 where the driver reports none.

    `index` counts as the driver does, whatever CUDA_VISIBLE_DEVICES says.
    """

    name: str
    capability: int = 0
    memory_bytes: int = 0
    free_bytes: int = 0
    index: int = 0
    uuid: str = ""

    @property
    def compute_capability(self) -> str:
        """As NVIDIA writes it: `9.0`."""
        major, minor = divmod(self.capability, 10)
        return f"{major}.{minor}"


class Nvml(Protocol):
    """The part of `pynvml` that is used here, under its own names."""

    NVMLError: type[Exception]
    NVML_P2P_CAPS_INDEX_NVLINK: int
    NVML_P2P_STATUS_OK: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]: ...
    def nvmlDeviceGetP2PStatus(self, device1: Any, device2: Any, p2pIndex: int) -> int: ...


def installed_gpus(nvml: Nvml | None = None) -> list[Gpu] | None:
    """Every GPU that this process may use, by index; None when no driver answers."""
    with _session(nvml) as library:
        if library is None:
            return None
        return [_describe(library, index, handle) for index, handle in _handles(library)]


def nvlink_pairs(nvml: Nvml | None = None) -> Links:
    """The GPUs that reach each other over NVLink, directly or through a switch.

    Empty when no driver answers.
    """
    with _session(nvml) as library:
        if library is None:
            return frozenset()
        handles = _handles(library)
        return frozenset(
            frozenset((first, second))
            for first, first_handle in handles
            for second, second_handle in handles
            if first < second and _has_nvlink(library, first_handle, second_handle)
        )


def driver_version(nvml: Nvml | None = None) -> str:
    """The driver's version, such as `580.95.05`; empty when there is none."""
    with _session(nvml) as library:
        if library is None:
            return kernel_module_version()
        try:
            return library.nvmlSystemGetDriverVersion()
        except library.NVMLError:
            return kernel_module_version()


def kernel_module_version(module: Path = _KERNEL_MODULE) -> str:
    """The version of the loaded kernel module; empty when there is none.

    Costs one read of a file, so it is safe wherever a rule file is parsed.
    """
    try:
        first = module.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", f" {first} ")
    return match.group(1) if match else ""


@contextmanager
def _session(nvml: Nvml | None) -> Iterator[Nvml | None]:
    """NVML, initialised; None when it cannot be loaded or the driver does not answer."""
    library = nvml or _load()
    if library is None or not _starts(library):
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _starts(nvml: Nvml) -> bool:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return False
    return True


def _load() -> Nvml | None:
    try:
        import pynvml
    except ImportError:  # an image of another origin may lack it
        return None
    return cast(Nvml, pynvml)


def _handles(nvml: Nvml) -> list[tuple[int, Any]]:
    """Those that this process may open: a container is given only some of the GPUs."""
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError:
        return []
    handles = []
    for index in range(count):
        try:
            handles.append((index, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError:
            continue
    return handles


def _describe(nvml: Nvml, index: int, handle: Any) -> Gpu:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)  # none where CPU and GPU share it
    major, minor = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle) or (0, 0)
    return Gpu(
        name=_ask(nvml, nvml.nvmlDeviceGetName, handle) or "",
        capability=10 * major + minor,
        memory_bytes=memory.total if memory else 0,
        free_bytes=memory.free if memory else 0,
        index=index,
        uuid=_ask(nvml, nvml.nvmlDeviceGetUUID, handle) or "",
    )


def _ask(nvml: Nvml, query: Any, handle: Any) -> Any:
    """What the driver answers; None for a query that it does not support for this GPU."""
    try:
        return query(handle)
    except nvml.NVMLError:
        return None


def _has_nvlink(nvml: Nvml, first: Any, second: Any) -> bool:
    try:
        status = nvml.nvmlDeviceGetP2PStatus(first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:
        return False
    return status == nvml.NVML_P2P_STATUS_OK
