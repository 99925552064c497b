"""The cost that the TensorRT-LLM adapter adds to each token of the library.

    python tests/benchmarks/trtllm_adapter.py [--quick] [--batch N]

No model runs. The stand-in's results are fed by hand, one token for each request of a batch at a
time, and read twice in turns (A B A B): by a bare `async for` that looks at the tokens, and by the
adapter, which turns them into outputs, delivers them to a sink once per turn of the loop, and polls
statistics and KV events meanwhile. Compared is the thread's CPU time, the least of all repeats, so
that other programs on the machine matter little. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in ("scripts", "tests/standin", "tests"):
    sys.path.insert(0, str(ROOT / folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import uvloop  # noqa: E402
from serving.engine.trtllm import engine as adapter  # noqa: E402
from serving.load_report import LoadReport  # noqa: E402
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams  # noqa: E402
from unit.engine.trtllm_rig import make_engine, make_manifest  # noqa: E402

with contextlib.redirect_stdout(sys.stderr):  # it says its version, as the real one does
    from tensorrt_llm.executor.result import IterationResult, RequestOutput, Response

LIMIT_US = 5.0
PROMPT = list(range(10, 26))


class FedLlm:
    """An `LLM` whose requests are answered by hand; one-token probes answer themselves."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self._stats, self._events = IterationResult(), IterationResult()
        cache = {"maxNumBlocks": 1000, "usedNumBlocks": 0, "tokensPerBlock": 16}
        self._stats.put(json.dumps({"numActiveRequests": 0, "kvCacheStats": cache}))

    def generate_async(
        self, inputs: list[int], sampling_params: Any, streaming: bool = False
    ) -> Any:
        result = RequestOutput(
            len(self.results), inputs, sampling_params, lambda _: None, None, None
        )
        if streaming:
            self.results.append(result)
        else:
            result._inbox.put(Response([1], "length"))
        return result

    def get_stats_async(self, timeout: float) -> Any:
        self._stats.set_timeout(timeout)
        return self._stats

    def get_kv_cache_events_async(self, timeout: float) -> Any:
        self._events.set_timeout(timeout)
        return self._events

    def shutdown(self) -> None: ...


class CountingSink:
    def __init__(self) -> None:
        self.num_tokens = self.num_finished = 0

    def __call__(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        del events, load
        for output in outputs:
            assert output.error is None, output.error
            self.num_tokens += len(output.token_ids)
            self.num_finished += output.finish_reason is not None


async def feed(results: list[Any], num_tokens: int) -> None:
    """One token for each result, and a wait until all are read, again and again."""
    inboxes = [result._inbox for result in results]

    def are_read() -> bool:
        return not any(inbox._items for inbox in inboxes)

    for token in range(num_tokens):
        reason = "length" if token == num_tokens - 1 else None
        for inbox in inboxes:
            # As its `put`, without waking the loop from another thread: that costs more, and varies
            # more, than all that is measured here.
            inbox._items.append(Response([token], reason))
            inbox._news.set()
        await turns_until(are_read)


async def turns_until(condition: Callable[[], bool]) -> None:
    while True:
        await asyncio.sleep(0)
        if condition():
            return


async def bare(llm: FedLlm, batch: int, num_tokens: int) -> float:
    """Seconds of CPU with a reader that only looks at what came."""
    llm.results.clear()
    num_received = [0] * batch

    async def read(place: int) -> None:
        result = llm.generate_async(PROMPT, None, streaming=True)
        async for step in result:
            num_received[place] = len(step.outputs[0].token_ids)

    readers = [asyncio.create_task(read(place)) for place in range(batch)]
    await asyncio.sleep(0)
    started = time.thread_time()
    await feed(llm.results, num_tokens)
    await asyncio.gather(*readers)
    elapsed = time.thread_time() - started
    assert sum(num_received) == batch * num_tokens
    return elapsed


async def adapted(
    engine: adapter.TensorRtLlmEngine,
    llm: FedLlm,
    sink: CountingSink,
    batch: int,
    num_tokens: int,
    stops: tuple[int, ...],
) -> float:
    """Seconds of CPU with the adapter as the reader."""
    llm.results.clear()
    sink.num_tokens = sink.num_finished = 0
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0, stop_token_ids=stops)
    for n in range(batch):
        engine.submit(EngineRequest(f"r{n}", PROMPT, len(PROMPT), sampling))
    await turns_until(lambda: len(llm.results) == batch)
    started = time.thread_time()
    await feed(llm.results, num_tokens)
    await turns_until(lambda: sink.num_finished == batch)
    elapsed = time.thread_time() - started
    assert sink.num_tokens == batch * num_tokens
    return elapsed


async def measure(batch: int, num_tokens: int, repeats: int) -> float:
    """Microseconds per token that the adapter adds."""
    llm, sink = FedLlm(), CountingSink()
    adapter.load_llm = lambda *_: llm  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "llm_args-agg.yaml").write_text("model: .\n")
        manifest = make_manifest(vocab_size=1 << 20)
        engine = make_engine(
            Path(name), manifest=manifest, max_batch_size=batch, max_model_len=1 << 16
        )
        await engine.start(sink)
    eos = manifest.vocab_size - 1  # a stop to look for, which does not come
    theirs, ours = [], []
    for repeat in range(repeats + 1):  # the first one warms up
        bare_s = await bare(llm, batch, num_tokens)
        adapted_s = await adapted(engine, llm, sink, batch, num_tokens, (eos,))
        if repeat:
            theirs.append(bare_s)
            ours.append(adapted_s)
    await engine.close()
    added_s = min(ours) - min(theirs)
    return added_s * 1e6 / (batch * num_tokens)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch", type=int, default=16, help="requests that get each token together"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    args = parser.parse_args()
    num_tokens, repeats = (300, 5) if args.quick else (1000, 11)
    # Alone, a token pays for a whole delivery.
    for name, batch in (("adapter per token", args.batch), ("adapter per token b1", 1)):
        added_us = await measure(batch, num_tokens, repeats)
        row = {
            "name": name,
            "ours": round(added_us, 3),
            "limit": LIMIT_US,
            "unit": "us",
            "ratio": round(added_us / LIMIT_US, 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
