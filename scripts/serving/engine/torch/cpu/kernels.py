"""Two pages of C for int8 engines on CPU: compiled when an engine is built, optional when it runs.

torch's libraries multiply int8 weights well, but only by 8-bit activations, which are too coarse
for language models; `packed_linear` gets around that at a price. And their attention wants keys and
values in one piece, so blocks are copied together for every token. The kernels read both where they
are. A machine that builds with a C compiler, for x86-64 with AVX2, leaves a shared library in the
engine folder; it is used where it loads and computes what it should.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from serving.progress import Report

log = logging.getLogger(__name__)

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c") for name in ("int8_linear", "decode_attention")
)
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
_COMPILE_S = 120.0

_INT16 = 2**15 - 1
_INT32 = 2**31 - 1
_EVERYTHING = 2**62  # a window that is never full
# The products' own error is that of 16-bit activations, about 3e-5.
_TOLERANCE = 1e-3


class CpuKernels:
    """The loaded library. Calls free the GIL; tensors are contiguous, and float32 unless stated."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it does not load, ValueError when it computes something else."""
        library = ctypes.CDLL(str(path))
        self._linear, self._attention = _functions(library)
        for shape in ((1, 37, 5), (3, 64, 67), (9, 50, 130)):
            self._require_right_products(*shape)
        for window in (None, 5):
            self._require_right_attention(window)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x[T, K] @ (scale * weight[N, K]).T + bias`; the weight is int8."""
        num_tokens, depth = x.shape
        width = weight.shape[0]
        out = x.new_empty((num_tokens, width))
        failed = num_tokens and self._linear(
            x.data_ptr(),
            num_tokens,
            depth,
            weight.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            width,
            largest_activation(depth),
            torch.get_num_threads(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for {num_tokens} quantized tokens")
        return out

    def can_attend(self, pool: torch.Tensor) -> bool:
        return pool.dtype == torch.float32 and pool.shape[-1] % 8 == 0 and not pool.is_cuda

    def decode_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        tables: np.ndarray,
        lengths: np.ndarray,
        *,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`query` and the result are `[B, Hq, D]`; int64 `tables[B, W]` are the blocks in `pool`
        (as `KvPool.tensor`) of `lengths[B]` tokens, the new ones included."""
        num_sequences, num_heads, dim = query.shape
        _, num_layers, _, block_size, num_kv_heads, _ = pool.shape
        out = torch.empty_like(query)
        failed = self._attention(
            query.data_ptr(),
            pool.data_ptr(),
            tables.ctypes.data,
            lengths.ctypes.data,
            num_sequences,
            tables.shape[1],
            layer,
            num_layers,
            block_size,
            num_kv_heads,
            num_heads // num_kv_heads,
            dim,
            _EVERYTHING if window is None else window,
            scaling,
            torch.get_num_threads(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for attention over {int(lengths.max())} tokens")
        return out

    def _require_right_products(self, num_tokens: int, depth: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((num_tokens, depth), generator=generator)
        weight = torch.randint(-127, 128, (width, depth), generator=generator, dtype=torch.int8)
        scale, bias = (torch.rand(width, generator=generator) for _ in range(2))
        expected = x @ (weight.float() * scale[:, None]).T + bias
        _require_close("products", self.linear(x, weight, scale, bias), expected)

    def _require_right_attention(self, window: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        pool = torch.randn((5, 2, 2, 4, 2, 16), generator=generator)
        query = torch.randn((2, 6, 16), generator=generator)
        tables, lengths = np.array([[3, 1], [4, 2]]), np.array([7, 5])
        ours = self.decode_attention(query, pool, 1, tables, lengths, scaling=0.3, window=window)
        for each in range(2):
            first = 0 if window is None else max(0, int(lengths[each]) - window)
            kept = pool[tables[each], 1].transpose(0, 1).reshape(2, 8, 2, 16)
            key, value = kept[:, first : lengths[each]].transpose(1, 2)
            expected = scaled_dot_product_attention(
                query[each, None, :, None], key[None], value[None], scale=0.3, enable_gqa=True
            )
            _require_close("attention", ours[each], expected[0, :, 0])


def largest_activation(depth: int) -> float:
    """Of 16 bits as much as lets a lane's sum of `depth` / 8 products stay below 2**31."""
    products = depth // 8 + 1
    return float(min(_INT16, _INT32 // (127 * products)))


def build(folder: Path, report: Report) -> None:
    """Compile the kernels into an engine folder, or report why the engine has none."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if not _is_suitable():
        report("no compiled kernels: they are for x86-64 CPUs with AVX2; decode is slower")
    elif compiler is None:
        report(
            "no compiled kernels, decode is slower: no C compiler (apt install gcc, then build again)"
        )
    else:
        target = library(folder)
        command = [compiler, *_FLAGS, "-o", str(target), *map(str, _SOURCES), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
            CpuKernels(target)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            target.unlink(missing_ok=True)
            lines = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines()
            report(f"no compiled kernels, decode is slower: {lines[0] if lines else exc}")
        else:
            report(f"compiled the CPU kernels with {compiler}")


def load(folder: Path) -> CpuKernels | None:
    """The kernels of an engine folder; None, with a line in the log, where they cannot be used."""
    path = library(folder)
    if not path.exists():
        log.info("no CPU kernels were compiled for this version: using torch's own operations")
        return None
    if not _is_suitable():
        log.warning("the CPU kernels need AVX2: using torch's own operations")
        return None
    try:
        kernels = CpuKernels(path)
    except (OSError, ValueError) as exc:
        log.warning("the CPU kernels do not work here: %s; using torch's own operations", exc)
        return None
    log.info("using the compiled CPU kernels")
    return kernels


def library(folder: Path) -> Path:
    """Where the kernels of this version are: another version's are not found, and so not loaded."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return folder / f"cpu-kernels-{digest.hexdigest()[:16]}.so"


def _functions(library: ctypes.CDLL) -> tuple[ctypes._FuncPointer, ctypes._FuncPointer]:
    pointer, size, real, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    try:
        linear, attention = library.int8_linear, library.decode_attention
    except AttributeError as exc:
        raise OSError(f"a function is missing: {exc}") from exc
    linear.argtypes = [
        pointer, size, size, pointer, pointer, pointer, size, real, number, pointer
    ]  # fmt: skip
    attention.argtypes = [*[pointer] * 4, *[size] * 9, real, number, pointer]
    linear.restype = attention.restype = number
    return linear, attention


def _require_close(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < _TOLERANCE:
        raise ValueError(f"its {what} are off by {error:.2g}")


def _is_suitable() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return platform.machine() == "x86_64" and capability.startswith(("AVX2", "AVX512"))
