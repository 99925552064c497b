"""KV transfer between two network namespaces, against a plain socket over the same link.

    python tests/benchmarks/kv_transfer_netns.py [--rounds N]       (as root)

Two namespaces joined by a veth pair, source in one and puller in the other, each listening on its
own address: what two machines do, with this kernel for a network. Rows, one JSON object a line:
`transfer ucx` and `transfer tcp`: bytes per second from memory to memory with the transport over
those with blocking socket calls, in turns (goal: 0.8). `link_bytes` is what the interface counted
during the transport's pulls, for one pull; blocks that do not arrive as they were end the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from benchmarks.kv_transfer import (  # noqa: E402
    CHUNK_BYTES,
    NUM_BLOCKS,
    NUM_BYTES,
    NUM_WARM_UP,
    SMOLLM2,
    Peer,
    answer,
    questions,
    receive_plain,
    serve_plain,
)
from kv_ends import Got, Held, params, pulling, random_blocks, serving  # noqa: E402

SOURCE, PULLER = "10.213.7.1", "10.213.7.2"
TRANSPORTS = ("ucx", "tcp")


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Joined by a link; gone afterwards, with whatever runs in them."""
    names = tuple(f"kv{os.getpid()}{side}" for side in "ab")
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        peer = ["peer", "name", "link0", "netns", names[1]]
        run("ip", "-n", names[0], "link", "add", "link0", "type", "veth", *peer)
        for name, address in zip(names, (SOURCE, PULLER), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
            run("ip", "-n", name, "link", "set", "link0", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def inside(namespace: str, *arguments: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, sys.executable, __file__, *arguments]


async def hold_blocks() -> None:
    """The source: the same blocks over each transport and a plain socket."""
    blocks = random_blocks(NUM_BLOCKS, SMOLLM2)
    held, options = Held(a=blocks), {"host": SOURCE, "chunk_bytes": CHUNK_BYTES}
    with socket.create_server((SOURCE, 0)) as listener:
        thread = threading.Thread(target=serve_plain, args=(listener, blocks.tobytes()))
        thread.start()
        async with (
            serving("ucx", held, SMOLLM2, **options) as ucx,
            serving("tcp", held, SMOLLM2, **options) as tcp,
        ):
            plain = listener.getsockname()[1]
            answer({"ucx": ucx.address, "tcp": tcp.address, "plain": plain})
            async for _ in questions():
                pass
        thread.join(10)


def received_on_link() -> int:
    return int(Path("/sys/class/net/link0/statistics/rx_bytes").read_text())


@contextmanager
def holder(source: str) -> Iterator[Peer]:
    """The source's process, in its namespace."""
    with subprocess.Popen(
        inside(source, "--hold"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Peer(process)
            assert process.stdin
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()


async def pull(source: str, rounds: int) -> None:
    """The puller: plain socket and transports in turns."""
    with holder(source) as peer:
        await measure(await peer.ask(), rounds)


async def measure(addresses: dict[str, Any], rounds: int) -> None:
    taken: dict[str, list[float]] = {name: [] for name in ("plain", *TRANSPORTS)}
    on_link = dict.fromkeys(TRANSPORTS, 0)
    expected = random_blocks(NUM_BLOCKS, SMOLLM2)
    memory, got = bytearray(NUM_BYTES), Got(expected)
    options = {"host": PULLER, "chunk_bytes": CHUNK_BYTES}
    async with (
        pulling("ucx", SMOLLM2, **options) as ucx,
        pulling("tcp", SMOLLM2, **options) as tcp,
    ):
        ends = {"ucx": ucx, "tcp": tcp}
        with socket.create_connection((SOURCE, addresses["plain"])) as sock:
            for _ in range(NUM_WARM_UP + rounds):
                started = time.perf_counter()
                receive_plain(sock, memoryview(memory))
                taken["plain"].append(time.perf_counter() - started)
                for name, end in ends.items():
                    got.blocks[:] = 0
                    wanted = params(addresses[name], "a", NUM_BLOCKS, SMOLLM2)
                    before, started = received_on_link(), time.perf_counter()
                    await end.pull(wanted, 0, NUM_BLOCKS, got)
                    taken[name].append(time.perf_counter() - started)
                    on_link[name] += received_on_link() - before
                    assert (got.blocks == expected).all(), "blocks are not what was sent"
    limit_s = statistics.median(taken["plain"][NUM_WARM_UP:])
    for name in TRANSPORTS:
        ours_s = statistics.median(taken[name][NUM_WARM_UP:])
        row = {
            "name": f"transfer {name}",
            "ours": round(NUM_BYTES / ours_s / 1e6, 1),
            "limit": round(NUM_BYTES / limit_s / 1e6, 1),
            "limit_name": f"plain socket over the same link, {NUM_BYTES} bytes",
            "unit": "MB/s",
            "ratio": round(limit_s / ours_s, 4),
            "link_bytes": on_link[name] // (NUM_WARM_UP + rounds),
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pull", metavar="NAMESPACE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        asyncio.run(hold_blocks())
    elif options.pull:
        asyncio.run(pull(options.pull, options.rounds))
    elif os.geteuid() != 0:
        raise SystemExit("only root can make network namespaces")
    else:
        with two_namespaces() as (source, puller):
            command = inside(puller, "--pull", source, "--rounds", str(options.rounds))
            subprocess.run(command, check=True, timeout=240)


if __name__ == "__main__":
    main()
