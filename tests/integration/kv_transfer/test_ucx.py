"""KV transfer over UCX: the contract, and that nothing of UCX stays behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from kv_contract import TransferContract
from kv_ends import SCRIPTS, Held, serving

pytestmark = pytest.mark.integration

TESTS = str(Path(__file__).parents[2])


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def ucx_stays_up() -> AsyncIterator[None]:
    """Ending UCX takes a second, which not every test needs to wait for."""
    async with serving("ucx", Held()):
        yield


@pytest.mark.usefixtures("ucx_stays_up")
@pytest.mark.asyncio(loop_scope="class")
class TestUcx(TransferContract):
    name = "ucx"


async def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints: UCX leaves its marks per process."""
    environment = {
        **os.environ,
        "UCX_LOG_FILE": os.devnull,  # a busy host makes it warn, on the standard output
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS), TESTS]),
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        code,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode().strip()


ONE_ROUND = """
import asyncio, os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from kv_ends import *
from kv_peers import pull_all
from waiting import until

def marks():
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )

async def one_round():
    blocks = random_blocks(64)
    async with serving("ucx", Held(a=blocks)) as source, pulling("ucx") as end:
        await pull_all(end, source.address, "a", blocks)
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_close_leaves_no_descriptor_and_no_thread(loop: str) -> None:
    code = f"""
import {loop}
{ONE_ROUND}
async def main():
    # One helper thread, or the executor's own growth would count as a leak.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    await one_round()
    before = marks()
    for _ in range(3):
        await one_round()
    await until(lambda: all(now <= then for now, then in zip(marks(), before)))

{loop}.run(main())
{loop}.run(main())  # another loop of the same process can use UCX afterwards
"""
    await run_python(code)


async def test_no_shared_memory_is_made_even_by_the_killed() -> None:
    code = f"""
{ONE_ROUND}
async def main():
    blocks = random_blocks(64)
    async with serving("ucx", Held(a=blocks)) as source, pulling("ucx") as end:
        await pull_all(end, source.address, "a", blocks)
        maps = Path("/proc/self/maps").read_text()
        marks = [line for line in maps.splitlines() if "/dev/shm" in line or "SYSV" in line]
        print(marks, flush=True)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(AssertionError, match=r"^\[\]"):
        await run_python(code)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "ucx" in name}


async def test_an_interface_chosen_in_the_environment_works_whatever_the_address() -> None:
    """UCX listens there and connects to itself from there: its port must know that address."""
    names = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if name != "lo" and any(entry.family == socket.AF_INET for entry in entries)
    ]
    if not names:
        pytest.skip("no interface but loopback has an IPv4 address")
    await run_python(
        f"""
{ONE_ROUND}
os.environ["UCX_NET_DEVICES"] = {names[0]!r}
asyncio.run(one_round())
"""
    )


async def test_an_idle_channel_costs_next_to_no_processor_time() -> None:
    code = f"""
{ONE_ROUND}
import time
async def main():
    blocks = random_blocks(64)
    async with serving("ucx", Held(a=blocks)) as source, pulling("ucx") as end:
        await pull_all(end, source.address, "a", blocks)
        await asyncio.sleep(0.2)
        used = time.process_time()
        await asyncio.sleep(1)
        print(time.process_time() - used)
asyncio.run(main())
"""
    assert float(await run_python(code)) < 0.2


async def test_ucx_variables_of_the_environment_keep_their_values() -> None:
    code = """
from serving.kv_transfer.transports.ucx.options import ucx_options
print(ucx_options("127.0.0.1"), ucx_options("10.0.0.1"))
"""
    given = await run_python(code, UCX_TLS="all", UCX_NET_DEVICES="eth0")
    assert "TLS" not in given
    assert "NET_DEVICES" not in given
    default = await run_python(code)
    assert default.count("'NET_DEVICES': 'lo'") == 1


async def test_ucx_that_cannot_start_names_the_remedy_and_fails_pulls_only() -> None:
    code = f"""
{ONE_ROUND}
from serving.errors import KvTransferFailed, OperatorError
async def main():
    try:
        async with serving("ucx", Held()):
            pass
    except OperatorError as exc:
        assert "tcp" in exc.remedy, exc
        print("refused")
    try:
        async with pulling("ucx") as end:
            await pull_all(end, "ucx://127.0.0.1:1", "a", random_blocks(1))
    except KvTransferFailed:
        print("failed")
asyncio.run(main())
"""
    printed = (await run_python(code, UCX_TLS="pigeon")).splitlines()
    assert "refused" in printed
    assert "failed" in printed
