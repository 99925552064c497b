"""A mock engine on a clock that only timers move, and a sink that collects its outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from serving.config import EngineConfig, MockConfig
from serving.engine.manifest import ENGINE_FORMAT, BuildCheck, DummyWeights, EngineManifest
from serving.engine.mock.engine import MockEngine
from serving.kv_layout import KvLayout
from serving.load_report import LoadReport
from serving.protocol import (
    BlocksRemoved,
    BlocksStored,
    EngineOutput,
    EngineRequest,
    KvEvent,
    Role,
    SamplingParams,
    Tier,
)
from tokenizers import Tokenizer, models

T = TypeVar("T")
BLOCK_SIZE = 8
LAYOUT = KvLayout.uniform(2, 2, 8, BLOCK_SIZE, "float32")
VOCAB = 100
EOS = 0
INVISIBLE = {1, 2}
"""A line break and a letter beyond ASCII."""


def save_engine(folder: Path) -> EngineManifest:
    """A tokenizer of words, and the manifest that a build would have written."""
    words = {"</s>": EOS, "\n": 1, "é": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return EngineManifest(
        format=ENGINE_FORMAT,
        fingerprint="mock",
        backend="mock",
        device="cpu",
        model_id="m",
        commit=None,
        architecture="Llama",
        dtype="float32",
        kv_layout=LAYOUT,
        model_max_len=4096,
        vocab_size=VOCAB,
        eos_token_ids=[EOS],
        bos_token_id=None,
        pad_token_id=None,
        hash_salt="mock",
        weights={},
        versions={},
        check=BuildCheck(
            kind="none", num_positions=0, max_abs_diff=0, argmax_agreement=0, tolerance=0
        ),
        created=0,
        dummy_weights=DummyWeights(0, 1),
    )


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time stands still while anything is ready, and jumps to the next timer when nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self.num_turns = self.num_timers = 0

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, *args: Any, **more: Any) -> asyncio.TimerHandle:
        self.num_timers += 1
        return super().call_at(when, *args, **more)

    def _run_once(self) -> None:
        this: Any = self
        self.num_turns += 1
        if not this._ready and not this._scheduled and not this._stopping:
            raise AssertionError("every task waits, and no timer is set")
        if not this._ready and this._scheduled:
            self._now = max(self._now, this._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]


def on_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Rig:
    """One engine. `outputs` and `ended` (request id to time) are those that the sink got."""

    def __init__(
        self, folder: Path, timing: MockConfig | None = None, *, role: Role = "agg", **engine: Any
    ) -> None:
        sizes = {"max_model_len": 256, "block_size": BLOCK_SIZE, "max_batch_size": 8, **engine}
        self.engine = MockEngine(
            folder,
            save_engine(folder),
            EngineConfig(backend="mock", **sizes),
            role=role,
            instance_id=f"{role}-0",
            timing=timing or MockConfig(zero_delay=True),
        )
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.loads: list[LoadReport] = []
        self.events: list[KvEvent] = []
        self.held: dict[Tier, set[int]] = {"device": set(), "host": set()}  # by the events
        self._change = asyncio.Event()

    async def __aenter__(self) -> Rig:
        await self.engine.start(self._sink)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()
        self.engine.check_integrity()
        assert self.engine.load().active_blocks == 0

    def _sink(self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport) -> None:
        now = asyncio.get_running_loop().time()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
            self.began.setdefault(output.request_id, now)
            if output.finish_reason is not None:
                self.ended[output.request_id] = now
        for event in events:
            if isinstance(event, BlocksStored):
                assert self.held[event.tier].isdisjoint(event.block_hashes), "stored twice"
                self.held[event.tier].update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                assert self.held[event.tier].issuperset(event.block_hashes), "never stored"
                self.held[event.tier].difference_update(event.block_hashes)
        self.events += events
        self.loads.append(load)
        for tier, hashes in self.held.items():
            assert set(self.engine.snapshot(tier)) == hashes
        self._change.set()

    def submit(self, request_id: str, tokens: list[int], max_tokens: int, **more: Any) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, **more.pop("sampling", {}))
        num_prompt = more.pop("num_prompt", len(tokens))
        self.engine.submit(EngineRequest(request_id, tokens, num_prompt, sampling, **more))

    async def end_of(self, *request_ids: str) -> None:
        while not all(request_id in self.ended for request_id in request_ids):
            self._change.clear()
            await self._change.wait()

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def last(self, request_id: str) -> EngineOutput:
        return self.outputs[request_id][-1]


def prompt(length: int, first: int = 3) -> list[int]:
    """Prompts of different `first` share no block."""
    return [3 + (first * 7 + i) % (VOCAB - 3) for i in range(length)]
