"""The paged KV cache: one tensor, and copies between its blocks and buffers in wire order.

Block-major, as on the wire (`kv_layout`), so that exporting a block is one contiguous copy.
Attention reaches it through two flat views where all layers keep KV of one shape: rows of whole
blocks (one per block, layer and key/value) to gather, rows of tokens to write. Otherwise each layer
has views of its own (`layer_views`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from serving.kv_layout import BlocksInPlace, KvLayout, PoolMemory

if TYPE_CHECKING:
    from serving.engine.torch.cpu.kernels import CpuKernels
    from serving.engine.torch.kv.block_copies import BlockCopies

# Types that turn what is beyond their range into NaN, and their largest number. Keys and values are
# kept with a scale of 1: this type's range is wide enough for them, and what is not saturates.
_MAX = {torch.float8_e4m3fn: 448.0}


class LayerKv(NamedTuple):
    """Where a layer's KV is: layer `row` of those that keep KV, in the order of a block. Layers
    that read what another one keeps write nothing."""

    row: int
    writes: bool = True


class KvPool:
    """`tensor` is `[1 + num_blocks, *layout.block_shape]`, or `[1 + num_blocks, numbers of a block]`
    where shapes differ.

    Block 0 stays zero: it pads block tables. `layers` says by a layer's number in the model where
    its KV is; None: each has its own, in order. `kernels`, if any, attend to blocks in place.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: str,
        kernels: CpuKernels | None = None,
        layers: Mapping[int, LayerKv] | None = None,
    ) -> None:
        self.layout = layout
        self.layers = layers or {i: LayerKv(i) for i in range(layout.num_layers)}
        per_block = (layout.block_size * layout.token_width,)
        shape = (num_blocks + 1, *(layout.block_shape if layout.is_uniform else per_block))
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        # Zeros, because padding and the unused rest of a block are read (and masked).
        if torch.device(device).type == "cpu":
            self.tensor = _untouched_zeros(shape, self.dtype)
        else:
            self.tensor = torch.zeros(shape, dtype=self.dtype, device=device)
        # Torch indexes no float8, but its bytes.
        rows = self.tensor.view(torch.uint8) if self.dtype in _MAX else self.tensor
        self.layer_views: list[list[torch.Tensor]] = []
        if layout.is_uniform:
            row = layout.block_size * layout.num_kv_heads * layout.head_dim
            self.block_rows = rows.view(-1, row)
            self.token_rows = rows.view(-1, layout.num_kv_heads, layout.head_dim)
        else:
            self.layer_views = _layer_views(rows, layout)
        self._bytes = self.tensor.view(num_blocks + 1, -1).view(torch.uint8)
        has_planes = layout.is_uniform and layout.num_planes == 2
        can_attend = kernels and has_planes and kernels.can_attend(self.tensor)
        self.kernels = kernels if can_attend else None
        self._copies: BlockCopies | None = None
        if self.tensor.is_cuda:
            from serving.engine.torch.kv.block_copies import BlockCopies

            self._copies = BlockCopies(self._bytes.unsqueeze(1))

    @property
    def memory(self) -> PoolMemory | None:
        """Of the GPU's; None on CPU."""
        if not self._copies:
            return None
        return PoolMemory(self._bytes.data_ptr(), self._bytes.numel())

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

    def layer_tokens(self, layer: int) -> torch.Tensor:
        """What is kept of one layer's tokens, where values are a part of keys:
        `[1 + num_blocks, block_size, num_kv_heads * key_dim]`, a view."""
        layout = self.layout
        size = layout.block_size * layout.num_kv_heads * layout.head_dim
        rows = self.tensor.view(len(self.tensor), -1)[:, layer * size : (layer + 1) * size]
        return rows.view(len(rows), layout.block_size, -1)

    def gather(self, blocks: Sequence[int], out: Any) -> None:
        """Copy blocks into `out`: a writable host buffer, or memory of the pool's GPU.

        Done when this returns, without waiting for anything else on the GPU: the step that wrote
        the blocks must be over. From any thread.
        """
        with torch.inference_mode():
            if self._copies:
                self._copies.gather(blocks, self._as_tensor(out))
                return
            source = self._bytes.numpy()
            target_rows = _as_array(out).reshape(len(blocks), -1)
            for row, block in enumerate(blocks):
                target_rows[row] = source[block]

    def scatter(self, blocks: Sequence[int], data: Any) -> None:
        """Copy whole blocks in wire order from `data` (host buffer, GPU memory, or blocks of another
        pool that is mapped here) into the pool.

        Done when this returns: steps that start afterwards read them. No step that is computing
        may still use these blocks for something else.
        """
        with torch.inference_mode():
            if self._copies and isinstance(data, BlocksInPlace):
                self._copies.fetch(blocks, data)
                return
            if self._copies:
                self._copies.scatter(blocks, self._as_tensor(data))
                return
            target = self._bytes.numpy()
            source_rows = _as_array(data).reshape(len(blocks), -1)
            for row, block in enumerate(blocks):
                target[block] = source_rows[row]

    def mark_step(self) -> Any:
        """An event behind what the calling thread has queued on the GPU; None on CPU, where a step
        is over when it returns."""
        if not self._copies:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.tensor.device))
        return event

    def clear(self, blocks: Sequence[int]) -> None:
        """Make blocks zero again (after the warm-up wrote to them)."""
        for block in blocks:
            self.tensor[block].zero_()

    def _as_tensor(self, buffer: Any) -> torch.Tensor:
        """The bytes of a host buffer, tensor or GPU memory, without a copy unless read-only."""
        if isinstance(buffer, torch.Tensor):
            return buffer.reshape(-1).view(torch.uint8)
        if hasattr(buffer, "__cuda_array_interface__"):
            tensor = torch.as_tensor(buffer, device=self.tensor.device).reshape(-1)
            address, _ = buffer.__cuda_array_interface__["data"]
            assert tensor.data_ptr() == address, "memory of another device, of which this is a copy"
            return tensor.view(torch.uint8)
        array = np.frombuffer(buffer, dtype=np.uint8)
        return torch.from_numpy(array if array.flags.writeable else array.copy())


def _layer_views(rows: torch.Tensor, layout: KvLayout) -> list[list[torch.Tensor]]:
    """Of each layer that keeps KV, `[blocks, block_size, H, D]` of keys, and of values if kept."""
    views: list[list[torch.Tensor]] = []
    first = 0
    for group in layout.groups:
        for _ in range(group.num_layers):
            own = []
            for dim in filter(None, (group.key_dim, group.value_dim)):
                size = layout.block_size * group.num_kv_heads * dim
                part = rows[:, first : first + size]
                own.append(part.view(-1, layout.block_size, group.num_kv_heads, dim))
                first += size
            views.append(own)
    return views


def _untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on CPU whose pages take no memory before something is written to them.

    `torch.zeros` writes to all of them. Raises MemoryError.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise MemoryError(f"{num_bytes} bytes: {exc.strerror}") from exc
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(tuple(shape))


def _as_array(buffer: Any) -> np.ndarray:
    """The bytes of a host buffer or CPU tensor, without a copy."""
    if isinstance(buffer, torch.Tensor):
        return buffer.reshape(-1).view(torch.uint8).numpy()
    return np.frombuffer(buffer, dtype=np.uint8)
