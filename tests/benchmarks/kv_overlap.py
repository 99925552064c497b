"""The part of a transfer that a client notices: the gap between the first and the second token.

    python tests/benchmarks/kv_overlap.py [--engine-dir DIR] [--rounds N] [--prompt-tokens N]

Prefill and decode endpoint with a torch engine each, in two processes, KV over UCX. Row:

- `overlapped transfer`: the gap when blocks are fetched while the prompt is being computed, against
  the gap when they are fetched afterwards, in turns; and the time of the prefill in both cases.

The gap holds one decode step, whose own time (the gap between later tokens) is given, too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import msgspec  # noqa: E402
from benchmarks.engines.engine_under_test import find_engine  # noqa: E402
from benchmarks.kv_transfer import CHUNK_BYTES, Worker, answer, peer, questions  # noqa: E402
from kv_ends import pulling, serving  # noqa: E402
from serving.protocol import (  # noqa: E402
    EngineOutput,
    EngineRequest,
    KvTransferParams,
    SamplingParams,
)
from serving.worker.decode import DecodeEndpoint  # noqa: E402
from serving.worker.prefill import PrefillEndpoint  # noqa: E402

WARM_UP = 2
NUM_TOKENS = 4
NUM_CHUNKS = 4


def prefill_request(name: str, tokens: list[int]) -> EngineRequest:
    sampling = SamplingParams(max_tokens=NUM_TOKENS + 1, temperature=0)
    return EngineRequest(name, tokens, len(tokens), sampling, phase="prefill")


async def prefill_worker(engine_dir: Path, threads: int, prompt_tokens: int) -> None:
    """Prints a line when a prompt can be followed, and one when its first token is there."""
    worker = Worker(engine_dir, threads, prompt_tokens, prompt_tokens // NUM_CHUNKS)
    await worker.start()
    layout = worker.engine.spec.kv_layout
    assert layout
    endpoints: dict[bool, PrefillEndpoint] = {}
    current = False

    def on_output(output: EngineOutput) -> None:
        told = endpoints[current].on_output(output)
        if told is not None:
            held = told.kv_transfer_params
            answer(
                {
                    "at": time.monotonic(),
                    "tokens": told.token_ids,
                    "params": msgspec.to_builtins(held),
                }
            )

    worker.on_output = on_output
    try:
        for overlap in (False, True):
            endpoints[overlap] = PrefillEndpoint(
                worker.engine,
                instance_id="prefill-0",
                epoch=1,
                hold_s=60.0,
                overlap=overlap,
                address=lambda: end.address,
            )
        both: Any = Both(endpoints)
        async with serving("ucx", both, layout, chunk_bytes=CHUNK_BYTES) as end:
            answer({})
            async for question in questions():
                current = question["overlap"]
                answer({"at": time.monotonic()})
                endpoints[current].submit(prefill_request(question["id"], question["tokens"]))
    finally:
        await worker.engine.close()


class Both:
    """The two endpoints as one source: a request belongs to the one whose turn it was."""

    def __init__(self, endpoints: dict[bool, PrefillEndpoint]) -> None:
        self._endpoints = endpoints

    def __getattr__(self, name: str) -> Any:
        def forward(request_id: str, *arguments: Any) -> Any:
            chosen = self._endpoints[request_id.startswith("overlapped")]
            return getattr(chosen, name)(request_id, *arguments)

        return forward


async def compare(engine_dir: Path, rounds: int, threads: int, prompt_tokens: int) -> None:
    random_source = random.Random(7)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    prefills: dict[bool, list[float]] = {False: [], True: []}
    steps: list[float] = []
    worker = Worker(engine_dir, threads, prompt_tokens, prompt_tokens)
    await worker.start()
    layout = worker.engine.spec.kv_layout
    assert layout
    arguments = ["--prefill", "--engine-dir", str(engine_dir), "--threads", str(threads)]
    arguments += ["--prompt-tokens", str(prompt_tokens)]
    seen: list[float] = []
    failures: list[str] = []

    def on_output(output: EngineOutput) -> None:
        if output.token_ids:
            seen.append(time.monotonic())

    worker.on_output = on_output
    try:
        with peer(*arguments, file=__file__) as other:
            await other.ask()
            async with (
                pulling("ucx", layout, chunk_bytes=CHUNK_BYTES) as end,
                asyncio.TaskGroup() as tasks,
            ):
                decode = DecodeEndpoint(
                    worker.engine, end, tasks, lambda output: failures.append(str(output.error))
                )
                for index in range(2 * (WARM_UP + rounds)):
                    overlap = bool(index % 2)
                    tokens = [random_source.randrange(1000, 30000) for _ in range(prompt_tokens)]
                    name = f"{'overlapped' if overlap else 'apart'}-{index}"
                    request = msgspec.structs.replace(prefill_request(name, tokens), phase="decode")
                    seen.clear()
                    finished = worker.expect(name)
                    begun = await other.ask({"id": name, "tokens": tokens, "overlap": overlap})
                    told = await other.ask()
                    held = msgspec.convert(told["params"], KvTransferParams)
                    request = msgspec.structs.replace(request, kv_transfer_params=held)
                    if overlap:
                        decode.submit(msgspec.structs.replace(request, follows_prefill=True))
                        told = await other.ask()
                    else:
                        decode.submit(
                            msgspec.structs.replace(request, token_ids=[*tokens, *told["tokens"]])
                        )
                    await asyncio.wait_for(finished, 60)
                    assert not failures, failures
                    gaps[overlap].append(seen[0] - told["at"])
                    prefills[overlap].append(told["at"] - begun["at"])
                    steps += [later - earlier for earlier, later in itertools.pairwise(seen)]
                assert decode.transfers.local_prefill_fallbacks == 0
    finally:
        await worker.engine.close()

    def median(values: list[float]) -> float:
        return round(1e3 * statistics.median(values[WARM_UP:]), 2)

    print(
        json.dumps(
            {
                "name": "overlapped transfer",
                "ours": median(gaps[True]),
                "peer": median(gaps[False]),
                "peer_name": "fetched after the prefill",
                "unit": "ms",
                "ratio": round(median(gaps[True]) / median(gaps[False]), 3),
                "decode_step_ms": median(steps),
                "prefill_ms": {
                    "overlapped": median(prefills[True]),
                    "apart": median(prefills[False]),
                },
                "prompt_tokens": prompt_tokens,
                "bytes": prompt_tokens * layout.token_bytes,
                "route": end.route,
            }
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prefill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine_dir = find_engine(options.engine_dir)
    run = prefill_worker(engine_dir, options.threads, options.prompt_tokens)
    if not options.prefill:
        run.close()
        run = compare(engine_dir, options.rounds, options.threads, options.prompt_tokens)
    asyncio.run(run)


if __name__ == "__main__":
    main()
