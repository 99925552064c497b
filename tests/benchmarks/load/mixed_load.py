"""Steady decode streams, and long prompts that arrive among them: the load that hurts most.

Open loop: long prompts arrive at times drawn beforehand (Poisson), however long earlier ones take.
One seed gives the same prompts and arrivals, so set-ups are compared under the same load.
"""

from __future__ import annotations

import asyncio
import gc
from itertools import pairwise
from time import perf_counter

import numpy as np
from benchmarks.load.streaming_client import Client, Completion
from msgspec import Struct

SETTLE_S = 20.0
"""How long the load goes on after the window until its prompts are answered."""


class Load(Struct, frozen=True, kw_only=True):
    """Lengths in tokens; `rate` in long prompts a second."""

    streams: int
    stream_prompt: int
    stream_output: int
    prompt: int
    output: int
    rate: float
    vocab_size: int
    warm_up_s: float
    measure_s: float
    seed: int
    temperature: float


class Measured(Struct, kw_only=True):
    """Of one window. ITL is between two events of a steady stream, TTFT that of long prompts, from
    when they were due; both in ms. `unfinished` prompts count with the time they waited so far.
    """

    itl_p50: float
    itl_p99: float
    itl_max: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    output_tokens_per_s: float
    num_gaps: int
    num_prompts: int
    unfinished: int
    failed: int
    first_failure: str
    tokens_per_event: float
    client_lag_p99: float


async def run(client: Client, load: Load) -> Measured:
    """Apply `load` for warm-up and window, and measure in the window."""
    return await _LoadRun(client, load).run()


class _LoadRun:
    def __init__(self, client: Client, load: Load) -> None:
        self._client, self._load = client, load
        self._random = np.random.default_rng([load.seed, round(1000 * load.rate)])
        self._streams: list[Completion] = []
        self._prompts: list[tuple[float, Completion]] = []  # when it was due
        self._lags: list[float] = []

    async def run(self) -> Measured:
        load = self._load
        total_s = load.warm_up_s + load.measure_s + SETTLE_S
        arrivals = self._arrivals(total_s)
        # Made beforehand: encoding 8k token ids takes as long as several tokens.
        requests = [self._request(load.prompt, load.output) for _ in arrivals]
        self._started = perf_counter()
        begin = self._started + load.warm_up_s
        end = begin + load.measure_s
        gc.collect()
        gc.disable()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._keep_streaming(index)) for index in range(load.streams)
                ]
                tasks.append(group.create_task(self._arrive(arrivals, requests)))
                await asyncio.sleep(end - perf_counter())
                events = sum(begin <= t < end for c in self._all() for t in c.times)
                await self._settle([c for due, c in self._prompts if begin <= due < end])
                for task in tasks:
                    task.cancel()
        finally:
            gc.enable()
            for completion in self._all():
                completion.cancel()
        return self._measured(begin, end, events)

    def _all(self) -> list[Completion]:
        return [*self._streams, *(completion for _, completion in self._prompts)]

    def _arrivals(self, total_s: float) -> list[float]:
        """Seconds from the start."""
        if self._load.rate <= 0:
            return []
        count = int(2 * self._load.rate * total_s) + 20
        gaps = self._random.exponential(1 / self._load.rate, count)
        return [float(t) for t in np.cumsum(gaps) if t < total_s]

    def _request(self, prompt: int, output: int) -> bytes:
        tokens = self._random.integers(3, self._load.vocab_size, prompt).tolist()
        more = {"temperature": self._load.temperature, "seed": 1}
        return self._client.encode(tokens, output, **more)

    async def _keep_streaming(self, index: int) -> None:
        """One stream after another; the first begins somewhere in the warm-up, and is shorter, so
        that they do not end together."""
        load = self._load
        await asyncio.sleep(0.5 * load.warm_up_s * index / load.streams)
        output = max(8, load.stream_output * (index + 1) // load.streams)
        while True:
            completion = await self._client.send(self._request(load.stream_prompt, output))
            self._streams.append(completion)
            await completion.ended.wait()
            output = load.stream_output
            if completion.error:  # counted, and not made worse by asking again at once
                await asyncio.sleep(0.2)

    async def _arrive(self, arrivals: list[float], requests: list[bytes]) -> None:
        for at, request in zip(arrivals, requests, strict=True):
            due = self._started + at
            await asyncio.sleep(due - perf_counter())
            self._lags.append(perf_counter() - due)
            self._prompts.append((due, await self._client.send(request)))

    async def _settle(self, completions: list[Completion]) -> None:
        waiting = [asyncio.create_task(completion.began.wait()) for completion in completions]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=SETTLE_S)
            for task in late:
                task.cancel()

    def _measured(self, begin: float, end: float, events: int) -> Measured:
        now = perf_counter()
        gaps = [
            after - before
            for completion in self._streams
            for before, after in pairwise(completion.times)
            if begin <= after < end
        ]
        window = [(due, c) for due, c in self._prompts if begin <= due < end]
        ttfts = [(c.times[0] if c.times else now) - due for due, c in window]
        whole = [c for c in self._all() if c.num_tokens]
        errors = [c.error for c in self._all() if c.error and c.error != "cancelled"]
        tokens = sum(c.num_tokens or 0 for c in whole)
        per_event = tokens / max(1, sum(len(c.times) for c in whole)) if whole else 1.0
        return Measured(
            itl_p50=_ms(gaps, 50),
            itl_p99=_ms(gaps, 99),
            itl_max=_ms(gaps, 100),
            ttft_p50=_ms(ttfts, 50),
            ttft_p90=_ms(ttfts, 90),
            ttft_p99=_ms(ttfts, 99),
            output_tokens_per_s=round(events * per_event / (end - begin), 1),
            num_gaps=len(gaps),
            num_prompts=len(window),
            unfinished=sum(not c.times for _, c in window),
            failed=len(errors),
            first_failure=errors[0] if errors else "",
            tokens_per_event=round(per_event, 4),
            client_lag_p99=_ms(self._lags, 99),
        )


def _ms(seconds: list[float], percent: float) -> float:
    return round(1e3 * float(np.percentile(seconds, percent)), 3) if seconds else 0.0
