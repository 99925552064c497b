"""`python -m serving.grammar.check_process FOLDER`: tries guides, each in a process of its own.

It reads the tokenizer once and forks for each guide. A guide that overflows the stack, or takes
too much time or memory, ends its own process only. Ends when its input does. Unix only.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from serving.errors import InvalidRequest
from serving.framing import FrameParser, frame
from serving.grammar.compiler import GuideCompiler, not_usable
from serving.grammar.trial import try_guide
from serving.protocol import Guide

MAX_FRAME_BYTES = 64 * 1024 * 1024
_STACK_BYTES = 2 * 1024 * 1024
"""An eighth of what an engine's thread has, so that what fits here fits there."""
_MEMORY_BYTES = 512 * 1024 * 1024
_NICE = 10


class CheckRequest(Struct, frozen=True, array_like=True):
    number: int
    guide: Guide
    cpu_s: float


class GuideCheckResult(Struct, frozen=True, array_like=True):
    """An empty `message`: it can be used."""

    number: int
    message: str = ""
    code: str | None = None


class Checks:
    """The processes that are trying a guide. They write their result to a pipe."""

    def __init__(self, folder: Path) -> None:
        self._compiler = GuideCompiler(folder)
        self._failure: InvalidRequest | None = None
        self._selector = selectors.DefaultSelector()
        self._parser = FrameParser(MAX_FRAME_BYTES)
        self._decoder = msgspec.msgpack.Decoder(CheckRequest)

    def serve(self, requests: BinaryIO, results: BinaryIO) -> None:
        try:
            self._compiler.load_tokenizer()
        except InvalidRequest as exc:
            self._failure = exc
        self._selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is requests:
                    data = os.read(requests.fileno(), 65536)
                    if not data:
                        return
                    for body in self._parser.feed(data):
                        self._begin(self._decoder.decode(body), results)
                else:
                    _write(results, self._collect(key))

    def _begin(self, request: CheckRequest, results: BinaryIO) -> None:
        if (failure := self._failure) is not None:
            _write(results, GuideCheckResult(request.number, failure.message, failure.code))
            return
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._run(request, writer)
        os.close(writer)
        self._selector.register(reader, selectors.EVENT_READ, (request, pid))

    def _run(self, request: CheckRequest, writer: int) -> None:
        """In the new process, which ends here."""
        status = 1
        try:
            _limit(request.cpu_s)
            try:
                try_guide(self._compiler, request.guide)
                result = GuideCheckResult(request.number)
            except InvalidRequest as exc:
                result = GuideCheckResult(request.number, exc.message, exc.code)
            os.write(writer, msgspec.msgpack.encode(result))
            status = 0
        finally:
            os._exit(status)

    def _collect(self, key: selectors.SelectorKey) -> GuideCheckResult:
        """What a process wrote before it ended, or why it did not."""
        reader = key.fd
        request, pid = key.data
        body = os.read(reader, 65536)
        self._selector.unregister(key.fileobj)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        if body:
            return msgspec.msgpack.decode(body, type=GuideCheckResult)
        refusal = not_usable(request.guide, _why(status, request.cpu_s))
        return GuideCheckResult(request.number, refusal.message, refusal.code)


def _limit(cpu_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        pass
    else:
        limit = size + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _why(status: int, cpu_s: float) -> str:
    match -os.waitstatus_to_exitcode(status):
        case signal.SIGPROF:
            return f"it takes more than {cpu_s:g} s (`frontend.guide_compile_s`) to compile"
        case signal.SIGSEGV | signal.SIGBUS:
            return "its rules or references are nested too deeply"
        case signal.SIGABRT | signal.SIGKILL:
            return f"it takes more than {_MEMORY_BYTES // 2**20} MiB to compile"
    return "it cannot be compiled"


def _write(results: BinaryIO, result: GuideCheckResult) -> None:
    results.write(frame(result))
    results.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent closes the input
    os.nice(_NICE)
    Checks(Path(sys.argv[1])).serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
