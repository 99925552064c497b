"""A machine's GPUs behind the functions of `pynvml`, under their real names and constants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pynvml
from serving.gpus import Gpu


class FakeNvml:
    """Handles are positions in `gpus`. None stands for a GPU that this process may not open.

    `nvlinks` are pairs of positions. A GPU without memory or capability does not support the
    query. With `broken` the driver does not answer at all.
    """

    NVMLError = pynvml.NVMLError
    NVML_P2P_CAPS_INDEX_NVLINK = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK

    def __init__(
        self,
        gpus: Sequence[Gpu | None] = (),
        nvlinks: Collection[frozenset[int]] = (),
        driver: str = "580.95.05",
        *,
        broken: bool = False,
    ) -> None:
        self.gpus, self.nvlinks, self.driver, self.broken = gpus, nvlinks, driver, broken
        self.sessions = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if self.gpus[index] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return index

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return self._gpu(handle).name

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return self._gpu(handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        gpu = self._gpu(handle)
        if not gpu.memory_bytes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=gpu.memory_bytes, free=gpu.free_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        gpu = self._gpu(handle)
        if not gpu.capability:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return divmod(gpu.capability, 10)

    def nvmlDeviceGetP2PStatus(self, device1: Any, device2: Any, p2pIndex: int) -> int:
        assert p2pIndex == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        linked = frozenset((device1, device2)) in self.nvlinks
        return pynvml.NVML_P2P_STATUS_OK if linked else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def _gpu(self, handle: int) -> Gpu:
        gpu = self.gpus[handle]
        assert gpu is not None
        return gpu
