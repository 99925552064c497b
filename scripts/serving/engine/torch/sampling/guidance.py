"""Guided decoding in the engine: one matcher a sequence, masks for the rows of a batch.

A matcher is compiled beside the engine's thread. It follows its sequence's tokens and nothing
else: preemption leaves it as it is, and on another worker it is made again from the tokens that
were generated before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from serving.engine.core.sequence import Guidance, Sequence
from serving.errors import InvalidRequest
from serving.grammar.compiler import CODE
from serving.grammar.grammars import Grammars
from serving.grammar.matcher import Matcher
from serving.protocol import EngineRequest, ErrorInfo

# Compiling recurses as deep as a guide is nested. Frontends try guides with an eighth of it.
_STACK_BYTES = 16 * 1024 * 1024


class Guides:
    """Compiles the guides of an engine's requests, one after the other, on a thread."""

    def __init__(self, engine_dir: Path) -> None:
        self._grammars = Grammars(engine_dir)
        self._executor = _executor_with_stack(_STACK_BYTES)

    def load(self) -> Future[None]:
        """Get ready for guides, before there are requests that would wait for it."""
        return self._executor.submit(self._grammars.load)

    def begin(self, sequence: Sequence, on_done: Callable[[], None]) -> None:
        """Give a sequence its guidance if it wants one; `on_done` runs on the thread."""
        if sequence.sampling.guide is None:
            return
        future = self._executor.submit(self._compile, sequence.request)
        sequence.guidance = CompiledGuidance(future)
        future.add_done_callback(lambda _: on_done())

    def close(self) -> None:
        """Waits for the one that is being compiled."""
        self._executor.shutdown(cancel_futures=True)

    def _compile(self, request: EngineRequest) -> Matcher:
        guide = request.sampling.guide
        assert guide is not None, "it was asked for"
        matcher = self._grammars.matcher(guide)
        generated = request.token_ids[request.num_prompt_tokens :]
        if generated:
            matcher.accept(generated)
        if matcher.error:
            raise InvalidRequest(
                f"what was generated does not fit its grammar: {matcher.error}", code=CODE
            )
        return matcher


def _executor_with_stack(num_bytes: int) -> ThreadPoolExecutor:
    """One thread, which is started here: its stack's size can be set for new threads only."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="torch-grammar")
    before = threading.stack_size(num_bytes)
    try:
        executor.submit(lambda: None)
    finally:
        threading.stack_size(before)
    return executor


class CompiledGuidance(Guidance):
    """See `sequence.Guidance`."""

    def __init__(self, future: Future[Matcher]) -> None:
        self._future = future

    @property
    def is_ready(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> ErrorInfo | None:
        """A guide that fails is its author's error and not the engine's."""
        if self._future.cancelled():
            return ErrorInfo("EngineFailed", "the engine is closing")
        failure = self._future.exception()
        if isinstance(failure, InvalidRequest):
            return ErrorInfo.from_error(failure)
        if failure is not None:
            return ErrorInfo("EngineFailed", f"guided decoding: {failure}")
        if why := self._future.result().error:
            return ErrorInfo(
                "InvalidRequest", f"The answer cannot go on in its form: {why}", code=CODE
            )
        return None

    @property
    def is_complete(self) -> bool:
        matcher = self.matcher()
        return matcher is not None and matcher.is_complete

    def accept(self, token: int) -> None:
        if (matcher := self.matcher()) is not None:
            matcher.accept([token])

    def matcher(self) -> Matcher | None:
        """Waits for it; None: there is none for the reason in `error`, which ends the request."""
        failed = self._future.cancelled() or self._future.exception() is not None
        return None if failed else self._future.result()


class Masks:
    """Makes the masks of guided rows. Used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def forbidden(self, sequences: Rows[Sequence], vocab_size: int) -> torch.Tensor:
        """Bool `[B, vocab]`: what must not come next. Host work beside the device's."""
        matchers = []
        for sequence in sequences:
            assert isinstance(sequence.guidance, CompiledGuidance), "guided rows only"
            matchers.append(sequence.guidance.matcher())
        width = max([(vocab_size + 31) // 32, *(m.num_words for m in matchers if m is not None)])
        words = torch.zeros(
            len(sequences), width, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        rows = words.numpy().view(np.uint32)
        for row, sequence, matcher in zip(rows, sequences, matchers, strict=True):
            if matcher is None:
                row[:] = 0xFFFFFFFF
                continue
            sampling = sequence.sampling
            matcher.allow(
                row[: matcher.num_words],
                sampling.stop_token_ids,
                may_end=sequence.num_output >= sampling.min_tokens,
            )
        on_device = words.to(self._device, non_blocking=True)
        bits = (on_device[:, :, None] >> self._bits) & 1
        return (bits == 0).view(len(sequences), -1)[:, :vocab_size]
