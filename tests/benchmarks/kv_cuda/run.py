"""KV from GPU to GPU: `kv_transfer.py --device cuda` runs this. Needs two GPUs, torch, ucxx.

Two processes, one GPU each (the other one visible, as in a deployment), KV pools of the
Llama-3-8B shape with shuffled blocks. What is timed is a pull: control messages, and all it takes
until every block is where it belongs. Contents are compared afterwards. Rows:

- `transfer 1k cuda`, `8k`, `32k`: blocks read in place, as a deployment does, against a `torch` copy
  of as many bytes between the two GPUs.
- `staged 1k cuda`, `8k`, `32k`: gather on the source's GPU, UCX, scatter on the other GPU.
- `nixl packed 8k`: the same over NIXL, where it is installed.
- `nixl per block 8k`: NIXL reading every layer of every block by itself (64 KiB each) without
  staging, and `nixl per whole block 8k` (2 MiB each), as our pool happens to lie in memory.
- `timeline 8k`: when each chunk was gathered and scattered, in ms since the pull began.
- `sweep 8k`: other chunk sizes and depths (with `--sweep`).
- `transfer 8k cuda isolated`: each process sees its own GPU only (with `--sweep`).

Where a transfer fails or goes through the host, UCX's own log is printed to stderr.
`--dry` runs a miniature of everything on a CPU with a stand-in for the GPU, to try these files.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from benchmarks.kv_cuda.ends import PROMPTS, note, write_row
from benchmarks.kv_cuda.puller import SCRIPT, Bench, source
from benchmarks.kv_cuda.source import serve
from serving.kv_transfer.transports.nixl import nixl_module

INFORMATIVE = re.compile(r"cuda|tagged|tag\(|ERROR|WARN|UCX_")  # lines of UCX's log


def about(dry: bool) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "ucxx-cu13", "libucx-cu13", "nixl-cu13", "numpy", "msgspec"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    facts: dict[str, Any] = {"name": "about", "python": sys.version.split()[0], **versions}
    facts["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not dry:
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.device_count() > 1:
            facts["peer_access"] = torch.cuda.can_device_access_peer(0, 1)
    return facts


def diagnose(options: argparse.Namespace, seconds_left: float) -> None:
    """Short runs with UCX's log: with the same transports, and with fewer."""
    variants = {
        "as it is": {},
        "UCX_TLS=tcp,self,cuda_copy,cuda_ipc": {"UCX_TLS": "tcp,self,cuda_copy,cuda_ipc"},
    }
    for what, extra in variants.items():
        if seconds_left < 25:
            note("no time is left for more diagnosis (--budget-s)")
            return
        started = time.monotonic()
        environment = {**os.environ, **extra, "UCX_LOG_LEVEL": "info", "UCX_PROTO_INFO": "y"}
        command = [sys.executable, str(SCRIPT)]
        command += ["--device", "cuda", "--only", "1k", "--no-diagnosis", "--keep-log"]
        try:
            again = subprocess.run(
                [*command, *(["--dry"] if options.dry else [])],
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds_left,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            note(f"--- diagnosis, {what}: not over within {seconds_left:.0f} s\n{exc.stderr!r}")
            return
        note(
            f"--- diagnosis, {what}: rc {again.returncode}\n{again.stdout}\n{again.stderr[-9000:]}"
        )
        seconds_left -= time.monotonic() - started


async def run(options: argparse.Namespace) -> list[str]:
    log = Path(tempfile.mkdtemp(prefix="kv-cuda-"), "source-ucx.log")
    os.environ.setdefault("UCX_LOG_FILE", str(log.with_name("puller-ucx.log")))
    only: list[str] = options.only or list(PROMPTS)
    try:
        with source(options, log) as child:
            bench = Bench(options, child)
            await child.ask()
            suffix = " isolated" if options.no_limit else ""
            await bench.read_in_place(only, suffix)
            await bench.staged(only, suffix)
            if not options.only:
                if nixl_module():
                    await bench.attempt("nixl packed 8k", bench.nixl_packed)
                    await bench.attempt("nixl per block 8k", bench.nixl_per_block)
                else:
                    write_row({"name": "nixl packed 8k", "skipped": "NIXL is not installed"})
                if options.sweep:
                    await bench.sweep()
            return bench.doubts
    finally:
        for name in sorted(log.parent.iterdir()):
            text = name.read_text(errors="replace")
            if text and (options.keep_log or "ERROR" in text or "WARN" in text):
                lines = [line for line in text.splitlines() if INFORMATIVE.search(line)]
                note(f"--- {name.name}\n" + "\n".join(lines[:60]))


def isolated(seconds_left: float) -> None:
    """Both processes again, each seeing only its own GPU."""
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    command = [sys.executable, str(SCRIPT), "--device", "cuda"]
    command += ["--only", "8k", "--no-diagnosis", "--no-limit", "--source-visible", visible[1]]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible[0]}
    subprocess.run(command, env=environment, timeout=seconds_left, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda"])
    parser.add_argument("--only", action="append", choices=list(PROMPTS))
    parser.add_argument("--sweep", action="store_true", help="other chunk sizes, isolation")
    parser.add_argument("--budget-s", type=float, default=85.0)
    for name in ("--dry", "--source", "--no-diagnosis", "--keep-log", "--no-limit"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source-visible", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    started = time.monotonic()
    faulthandler.dump_traceback_later(options.budget_s + 5, exit=True)
    if not options.dry and not options.source:
        count = torch.cuda.device_count()
        if count < (1 if options.no_limit else 2):
            raise SystemExit(f"needs two CUDA GPUs, {count} found")
        if not options.source_visible:
            # As deployments do: device 0 is a process's own, and it sees its peer's.
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
            options.source_visible = ",".join([visible[1], visible[0]])
    try:
        import uvloop as loops
    except ImportError:
        loops = asyncio  # type: ignore[assignment]
    if options.source:
        loops.run(serve(options))
        return
    write_row({**about(options.dry), "loop": loops.__name__})
    try:
        doubts = loops.run(run(options))
    except Exception:
        note(traceback.format_exc())
        doubts = ["it did not come to an end"]

    def left() -> float:
        return options.budget_s - (time.monotonic() - started)

    if doubts:
        note("doubts: " + "; ".join(doubts))
        if not options.no_diagnosis:
            diagnose(options, left())
    if options.sweep and not options.dry and left() > 20:
        isolated(left())
    if doubts and options.no_diagnosis:
        raise SystemExit(1)
