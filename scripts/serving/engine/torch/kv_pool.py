"""The paged KV cache: one tensor, and copies between its blocks and buffers in wire order.

Block-major, as on the wire (`kv_layout`), so that exporting a block is one contiguous copy.
Attention reaches it through two flat views: rows of whole blocks (one per block, layer and
key/value) to gather, rows of tokens to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from serving.kv_layout import KvLayout

# Types that turn what is beyond their range into NaN, and their largest number. Keys and values are
# kept with a scale of 1: this type's range is wide enough for them, and what is not saturates.
_MAX = {torch.float8_e4m3fn: 448.0}


class KvPool:
    """`tensor` is `[1 + num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.

    Block 0 stays zero: it pads block tables.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: str) -> None:
        self.layout = layout
        shape = (num_blocks + 1, *layout.block_shape)
        # Zeros, because padding and the unused rest of a block are read (and masked).
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        self.tensor = torch.zeros(shape, dtype=self.dtype, device=device)
        row = layout.block_size * layout.num_kv_heads * layout.head_dim
        # Torch indexes no float8, but its bytes.
        rows = self.tensor.view(torch.uint8) if self.dtype in _MAX else self.tensor
        self.block_rows = rows.view(-1, row)
        self.token_rows = rows.view(-1, layout.num_kv_heads, layout.head_dim)
        self._bytes = self.tensor.view(num_blocks + 1, -1).view(torch.uint8)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Keys or values as the pool keeps them, in its dtype: what is too large saturates."""
        if values.dtype == self.dtype:
            return values
        if largest := _MAX.get(self.dtype):
            values = values.clamp(-largest, largest)
        return values.to(self.dtype)

    def write_tokens(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Put `rounded` keys or values `[T, Hkv, D]` at `rows` of `token_rows`."""
        self.token_rows.index_copy_(0, rows, values.view(self.token_rows.dtype))

    def read_tokens(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of `token_rows`, in `dtype`."""
        return self.token_rows.index_select(0, rows).view(self.dtype).to(dtype)

    def read_blocks(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of `block_rows`, in `dtype`."""
        return self.block_rows.index_select(0, rows).view(self.dtype).to(dtype)

    def gather(self, blocks: Sequence[int], out: Any) -> None:
        """Copy blocks into `out`: a writable host buffer, or a tensor on any device."""
        with torch.inference_mode():
            if self.tensor.is_cuda:
                target = _as_tensor(out).view(len(blocks), -1)
                index = torch.tensor(blocks, device=self.tensor.device)
                target.copy_(self._bytes.index_select(0, index))
                torch.cuda.current_stream().synchronize()
                return
            source = self._bytes.numpy()
            target_rows = _as_array(out).reshape(len(blocks), -1)
            for row, block in enumerate(blocks):
                target_rows[row] = source[block]

    def scatter(self, blocks: Sequence[int], data: Any) -> None:
        """Copy whole blocks in wire order from `data` (host buffer or tensor) into the pool."""
        with torch.inference_mode():
            if self.tensor.is_cuda:
                rows = _as_tensor(data).view(len(blocks), -1).to(self.tensor.device)
                index = torch.tensor(blocks, device=self.tensor.device)
                self._bytes.index_copy_(0, index, rows)
                torch.cuda.current_stream().synchronize()
                return
            target = self._bytes.numpy()
            source_rows = _as_array(data).reshape(len(blocks), -1)
            for row, block in enumerate(blocks):
                target[block] = source_rows[row]

    def clear(self, blocks: Sequence[int]) -> None:
        """Make blocks zero again (after the warm-up wrote to them)."""
        for block in blocks:
            self.tensor[block].zero_()


def _as_array(buffer: Any) -> np.ndarray:
    """The bytes of a host buffer or CPU tensor, without a copy."""
    if isinstance(buffer, torch.Tensor):
        return buffer.reshape(-1).view(torch.uint8).numpy()
    return np.frombuffer(buffer, dtype=np.uint8)


def _as_tensor(buffer: Any) -> torch.Tensor:
    """The bytes of a host buffer or tensor, as a tensor, without a copy unless read-only."""
    if isinstance(buffer, torch.Tensor):
        return buffer.reshape(-1).view(torch.uint8)
    if hasattr(buffer, "__cuda_array_interface__"):
        return torch.as_tensor(buffer, device="cuda").reshape(-1).view(torch.uint8)
    array = np.frombuffer(buffer, dtype=np.uint8)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
