"""Run inside a container: prints what a worker would find there. Needs nothing but Python.

Each line is MARK and then JSON: first the facts, then the outcome of importing each module on the
command line, so that an import that ends the process hides nothing before it. It runs as a file by
its path, because the image may lack everything that this package imports.
"""

import ctypes
import glob
import importlib
import json
import os
import re
import resource
import sys

MARK = "@serving-probe "


def facts() -> dict[str, object]:
    """Limits in bytes, -1 for none; `cuda_*` come from the driver, None without a driver."""
    found: dict[str, object] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "cuda_version": os.environ.get("CUDA_VERSION", ""),
        "driver": _driver(),
        "devices": len(glob.glob("/dev/nvidia[0-9]*")),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": _size("/dev/shm"),
        "infiniband": os.path.isdir("/dev/infiniband"),
        "cuda_init": None,
        "cuda_driver": None,
        "cuda_gpus": None,
    }
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return found
    number = ctypes.c_int()
    found["cuda_init"] = cuda.cuInit(0)
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
        found["cuda_driver"] = number.value
    if found["cuda_init"] == 0 and cuda.cuDeviceGetCount(ctypes.byref(number)) == 0:
        found["cuda_gpus"] = number.value
    return found


def _driver() -> str:
    """The kernel module's version, as `580.95.05`; empty without one."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            match = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)*)", file.read())
    except OSError:
        return ""
    return match.group(1) if match else ""


def _size(folder: str) -> int:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0
    return stat.f_frsize * stat.f_blocks


def _import(name: str) -> dict[str, str]:
    try:
        module = importlib.import_module(name)
    except BaseException as exc:  # a library may also leave by SystemExit
        return {"module": name, "error": f"{type(exc).__name__}: {exc}"}
    return {"module": name, "version": str(getattr(module, "__version__", ""))}


if __name__ == "__main__":
    # The folder of this file has modules with common names; the package is found by PYTHONPATH.
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    print(MARK + json.dumps(facts()), flush=True)
    for module_name in sys.argv[1:]:
        print(MARK + json.dumps(_import(module_name)), flush=True)
