"""Finds out whether a guide can be used, without running it where it could do harm.

A guide is a program that a caller wrote: it can take minutes to compile, gigabytes, or the whole
stack. So it is tried in a process of its own (`check_process`), beside the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import sys
from collections import OrderedDict
from pathlib import Path

import msgspec

import serving
from serving.errors import EngineFailed, InvalidRequest, Overloaded
from serving.framing import FrameParser, frame
from serving.grammar.check_process import MAX_FRAME_BYTES, CheckRequest, GuideCheckResult
from serving.protocol import Guide

log = logging.getLogger(__name__)

_MAX_AT_ONCE = 2
_MAX_WAITING = 64
_MAX_KNOWN = 4096
"""Results that are kept: a digest and at most a message each."""
_START_S = 30.0
_SLACK = 10
"""A busy machine gives a check so much less than the CPU time that it may use."""


class GuideChecker:
    """Checks guides for the tokenizer in `folder`. Used on one event loop.

    The process starts with the first guide, and again after it was lost.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 1024 * 1024, cpu_s: float = 3.0) -> None:
        self._folder, self._max_bytes, self._cpu_s = folder, max_bytes, cpu_s
        self._known: OrderedDict[bytes, GuideCheckResult] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[GuideCheckResult]] = {}
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)
        self._starting = asyncio.Lock()
        self._process: CheckProcess | None = None

    async def check(self, guide: Guide, param: str) -> None:
        """Raises InvalidRequest for `param` if it cannot be used, Overloaded if nobody could tell."""
        num_bytes = len(guide.text.encode())
        if num_bytes > self._max_bytes:
            raise InvalidRequest(
                f"`{param}` makes a guide of {num_bytes} bytes; "
                f"`frontend.guide_bytes` allows {self._max_bytes}",
                param=param,
                code="invalid_grammar",
            )
        key = hashlib.blake2b(f"{guide.kind}:{guide.text}".encode(), digest_size=16).digest()
        result = self._known.get(key) or await self._result(key, guide)
        if result.message:
            raise InvalidRequest(result.message, param=param, code=result.code)

    async def close(self) -> None:
        """Ends the process and everything that waits for it."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process is not None:
            await self._process.close()
            self._process = None

    async def _result(self, key: bytes, guide: Guide) -> GuideCheckResult:
        """Requests with the same guide share its check, and one that leaves does not end it."""
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= _MAX_WAITING:
                raise Overloaded("Too many guides are waiting to be compiled")
            task = self._running[key] = asyncio.create_task(self._ask(guide), name="check-guide")
            task.add_done_callback(lambda done: self._finished(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # and not only this request
                raise Overloaded("The model was replaced meanwhile") from None
            raise

    def _finished(self, key: bytes, task: asyncio.Task[GuideCheckResult]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._known[key] = task.result()
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    async def _ask(self, guide: Guide) -> GuideCheckResult:
        async with self._slots:
            process = await self._live_process()
            try:
                async with asyncio.timeout(_START_S + _SLACK * self._cpu_s):
                    return await process.ask(guide, self._cpu_s)
            except TimeoutError:
                await process.close()
                raise Overloaded("A guide could not be checked in time") from None

    async def _live_process(self) -> CheckProcess:
        async with self._starting:
            if self._process is None or not self._process.is_alive:
                if self._process is not None:
                    await self._process.close()
                self._process = await CheckProcess.start(self._folder)
            return self._process


class CheckProcess:
    """The other end of `check_process`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[GuideCheckResult]] = {}
        self._reader = asyncio.create_task(self._read(), name="guide-checks")

    @classmethod
    async def start(cls, folder: Path) -> CheckProcess:
        package = str(Path(serving.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.grammar.check_process", str(folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                # It forks, so it must have one thread only.
                "TOKENIZERS_PARALLELISM": "false",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        return cls(process)

    @property
    def is_alive(self) -> bool:
        return not self._reader.done()

    async def ask(self, guide: Guide, cpu_s: float) -> GuideCheckResult:
        """Raises EngineFailed when the process ends without an answer."""
        number = next(self._numbers)
        answer: asyncio.Future[GuideCheckResult] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            if self._reader.done():
                raise EngineFailed("the process that checks guides has ended")
            assert self._process.stdin is not None
            self._process.stdin.write(frame(CheckRequest(number, guide, cpu_s)))
            return await answer
        finally:
            del self._waiting[number]

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        parser = FrameParser(MAX_FRAME_BYTES)
        decoder = msgspec.msgpack.Decoder(GuideCheckResult)
        try:
            while data := await self._process.stdout.read(65536):
                for body in parser.feed(data):
                    result = decoder.decode(body)
                    answer = self._waiting.get(result.number)
                    if answer is not None and not answer.done():
                        answer.set_result(result)
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(EngineFailed("the process that checks guides has ended"))
