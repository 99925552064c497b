"""Small host arrays to the device, many in one copy that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float64): torch.float64}


def upload(arrays: list[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the same shapes and values; `arrays` are int64 or float64.

    On CUDA the copy runs on the current stream. The pinned buffer goes back to torch's allocator,
    which keeps it until the copy is over.
    """
    if device.type != "cuda":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    num_words = sum(array.size for array in arrays)
    buffer = torch.empty(num_words, dtype=torch.int64, pin_memory=num_words > 0)
    words, start, spans = buffer.numpy(), 0, []
    for array in arrays:
        words[start : start + array.size] = array.reshape(-1).view(np.int64)
        spans.append((start, start + array.size))
        start += array.size
    on_device = buffer.to(device, non_blocking=True)
    return [
        on_device[first:last].view(_DTYPES[array.dtype]).view(array.shape)
        for array, (first, last) in zip(arrays, spans, strict=True)
    ]
