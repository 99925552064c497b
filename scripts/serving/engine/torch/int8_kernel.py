"""The compiled product of float32 activations and int8 weights: made at build, optional at run time.

torch's libraries multiply int8 weights well on CPU, but only by 8-bit activations, which are too
coarse for language models; `packed_linear` gets around that at a price. A page of C does it at the
speed of memory. Where the machine that builds has a C compiler and an x86-64 CPU with AVX2, the
engine folder holds its shared library; it is used where it loads and computes what it should.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import nn

from serving.engine.files import Progress

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("int8_linear.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O3", "-mavx2", "-mfma", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
_COMPILE_S = 120.0

_INT16 = 2**15 - 1
_INT32 = 2**31 - 1
# The kernel's own error is that of 16-bit activations, about 3e-5.
_TOLERANCE = 1e-3


class Int8Kernel:
    """The loaded library. `out[T, N] = x[T, K] @ (scale * weight[N, K]).T + bias`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it does not load, ValueError when it computes something else."""
        self._multiply = ctypes.CDLL(str(path)).int8_linear
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._multiply.argtypes = [
            pointer, size, size, pointer, pointer, pointer, size,
            ctypes.c_float, ctypes.c_int, pointer,
        ]  # fmt: skip
        self._multiply.restype = ctypes.c_int
        for shape in ((1, 37, 5), (3, 64, 67), (9, 50, 130)):
            self._require_right(*shape)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """All contiguous, float32 but for the int8 weight; `x` is `[T, K]`. Frees the GIL."""
        num_tokens, depth = x.shape
        width = weight.shape[0]
        out = x.new_empty((num_tokens, width))
        failed = num_tokens and self._multiply(
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

    def _require_right(self, num_tokens: int, depth: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((num_tokens, depth), generator=generator)
        weight = torch.randint(-127, 128, (width, depth), generator=generator, dtype=torch.int8)
        scale, bias = (torch.rand(width, generator=generator) for _ in range(2))
        expected = x @ (weight.float() * scale[:, None]).T + bias
        error = (self.linear(x, weight, scale, bias) - expected).norm() / expected.norm()
        if not float(error) < _TOLERANCE:
            raise ValueError(f"its products are off by {float(error):.2g}")


class KernelLinear(nn.Module):
    """A linear layer of the compiled kernel, over int8 weights as they are stored."""

    def __init__(
        self,
        kernel: Int8Kernel,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self._in_features = weight.shape
        self._kernel, self._bias = kernel, bias
        self._weight, self._scale = weight.contiguous(), scale.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self._in_features).contiguous()
        out = self._kernel.linear(rows, self._weight, self._scale, self._bias)
        return out.view(*x.shape[:-1], self.out_features)


def largest_activation(depth: int) -> float:
    """Of 16 bits as much as lets a lane's sum of `depth` / 8 products stay below 2**31."""
    products = depth // 8 + 1
    return float(min(_INT16, _INT32 // (127 * products)))


def build(folder: Path, progress: Progress) -> None:
    """Compile the kernel into an engine folder, or tell why the engine does without."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if not _is_suitable():
        progress("no int8 kernel: it is for x86-64 CPUs with AVX2")
    elif compiler is None:
        progress(
            "no int8 kernel: this machine has no C compiler (apt install gcc), decode is slower"
        )
    else:
        target = library(folder)
        command = [compiler, *_FLAGS, "-o", str(target), str(_SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
            Int8Kernel(target)
        except (OSError, ValueError, subprocess.SubprocessError) as exc:
            target.unlink(missing_ok=True)
            said = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines()
            progress(f"no int8 kernel, decode is slower: {said[0] if said else exc}")
        else:
            progress(f"compiled the int8 kernel with {compiler}")


def load(folder: Path) -> Int8Kernel | None:
    """The kernel of an engine folder; None, with a line in the log, where it cannot be used."""
    path = library(folder)
    if not path.exists():
        log.info("no int8 kernel was compiled for this version: using torch's own products")
        return None
    if not _is_suitable():
        log.warning("the int8 kernel needs a CPU with AVX2: using torch's own products")
        return None
    try:
        return Int8Kernel(path)
    except (OSError, ValueError) as exc:
        log.warning("the int8 kernel does not work here: %s; using torch's own products", exc)
        return None


def library(folder: Path) -> Path:
    """Where the kernel of this version is: another version's is not found, and so not loaded."""
    digest = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()
    return folder / f"int8-{digest[:16]}.so"


def _is_suitable() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return platform.machine() == "x86_64" and capability.startswith(("AVX2", "AVX512"))
