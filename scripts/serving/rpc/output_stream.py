"""The outputs of one request, as an asynchronous iterator over its connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from serving.errors import ServingError
from serving.protocol import Abort, EngineOutput, EngineRequest, ErrorInfo, Generate
from serving.rpc.errors import raise_error


class StreamConnection(Protocol):
    """The connection to the worker, as a stream uses it."""

    def open(self, request_id: str, stream: OutputStream) -> None:
        """Deliver the outputs of this request to `stream`."""

    def drop(self, request_id: str, stream: OutputStream) -> bool:
        """Stop that. Returns whether the request was still running."""

    def send(self, message: Any) -> None:
        """Queue one message; does nothing when the connection is lost."""


class OutputStream:
    """The outputs of one request: `async with client.generate(...) as outputs`, then iterate.

    Leaving before the last output aborts the request on the worker. Iterating raises the errors of
    `raise_error`, and InstanceLost when the connection drops. Deadlines are up to the caller.
    """

    __slots__ = (
        "_connect",
        "_connection",
        "_error",
        "_finished",
        "_merge",
        "_queue",
        "_request",
        "_waiter",
    )

    def __init__(
        self, connect: Callable[[], StreamConnection], request: EngineRequest, *, merge: bool
    ) -> None:
        """`connect` raises InstanceLost without a connection. `merge`: see `RpcClient`."""
        self._connect, self._request, self._merge = connect, request, merge
        self._connection: StreamConnection | None = None
        self._queue: deque[EngineOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: ServingError | None = None
        self._finished = False

    async def __aenter__(self) -> OutputStream:
        """Sends the request. Raises InstanceLost without a connection."""
        connection = self._connection = self._connect()
        connection.open(self._request.request_id, self)
        try:
            connection.send(Generate(self._request))
        except BaseException:  # such as a field that cannot be encoded
            connection.drop(self._request.request_id, self)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._connection is not None
        if self._connection.drop(self._request.request_id, self):
            self._connection.send(Abort(self._request.request_id))

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> EngineOutput:
        while not self._queue:
            if self._finished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output = self._queue.popleft()
        if self._queue and self._merge and _is_plain(output):
            output = self._with_following(output)
        if output.finish_reason is not None:
            self._finished = True
            if output.finish_reason == "error":
                raise_error(output.error or ErrorInfo("EngineFailed", "no reason given"))
        return output

    def _with_following(self, first: EngineOutput) -> EngineOutput:
        """`first` and the plain outputs behind it, merged into one."""
        queue, parts = self._queue, [first]
        while queue and parts[-1].finish_reason is None and _is_plain(queue[0]):
            parts.append(queue.popleft())
        if len(parts) == 1:
            return first
        logprobs = None
        if first.logprobs is not None:
            logprobs = [entry for part in parts for entry in part.logprobs or ()]
        return EngineOutput(
            first.request_id,
            [token_id for part in parts for token_id in part.token_ids],
            parts[-1].finish_reason,
            first.cached_tokens,
            parts[-1].stop_token_id,
            logprobs,
            prompt_logprobs=first.prompt_logprobs,
        )

    # --- called by the connection --------------------------------------------------------------

    def put(self, output: EngineOutput) -> None:
        self._queue.append(output)
        self._wake()

    def fail(self, error: ServingError) -> None:
        """`error` is raised after the outputs that have already arrived."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _is_plain(output: EngineOutput) -> bool:
    """Whether it carries only tokens, and perhaps their end. Plain outputs can be merged."""
    return (
        output.kv_transfer_params is None
        and output.embedding is None
        and output.error is None
        and output.finish_reason in (None, "stop", "length")
    )
