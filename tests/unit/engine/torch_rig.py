"""A tiny random model on disk, an engine over it, and a sink that collects its outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving.config import EngineConfig
from serving.engine.torch.engine import TorchEngine
from serving.engine.torch.runner import ModelRunner
from serving.load_report import LoadReport
from serving.protocol import (
    BlocksRemoved,
    BlocksStored,
    EngineOutput,
    EngineRequest,
    KvEvent,
    SamplingParams,
    Tier,
    TokenLogprob,
)
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

VOCAB = 256
DEADLINE_S = 30.0
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # spreads the logits, so that greedy choices are not near-ties
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


def save_model(folder: Path, config: Any = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def generate(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens of transformers: greedy, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


def request(
    request_id: str, prompt: list[int], sampling: SamplingParams, **more: Any
) -> EngineRequest:
    num_prompt = more.pop("num_prompt_tokens", len(prompt))
    return EngineRequest(request_id, prompt, num_prompt, sampling, **more)


class Sink:
    """Everything that an engine has delivered, and a way to wait for more."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.last: dict[str, EngineOutput] = {}
        self.cached: dict[str, int] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprob]] = {}
        self.events: list[KvEvent] = []
        self.held: dict[Tier, set[int]] = {"device": set(), "host": set()}  # by the events
        self.load: LoadReport | None = None
        self.num_steps = 0
        self._delivery = asyncio.Event()

    def __call__(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        self.load = load
        self.num_steps += 1
        for output in outputs:
            assert output.request_id not in self.last, "an output after the last one"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            self.logprobs.setdefault(output.request_id, []).extend(output.logprobs or [])
            if output.cached_tokens is not None:
                assert output.request_id not in self.cached, "cached_tokens reported twice"
                self.cached[output.request_id] = output.cached_tokens
            if output.prompt_logprobs is not None:
                assert output.request_id not in self.prompt_logprobs, "reported twice"
                self.prompt_logprobs[output.request_id] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.last[output.request_id] = output
        for event in events:
            self._apply(event)
        self.events += events
        self._delivery.set()

    @property
    def stored(self) -> set[int]:
        """What is on the device."""
        return self.held["device"]

    def _apply(self, event: KvEvent) -> None:
        if isinstance(event, BlocksStored):
            hashes, held = set(event.block_hashes), self.held[event.tier]
            assert event.parent_hash is None or event.parent_hash in self.stored
            assert not held & hashes, "stored twice"
            held |= hashes
            assert self.stored >= hashes, "on the host before it was on the device"
        elif isinstance(event, BlocksRemoved):
            hashes, held = set(event.block_hashes), self.held[event.tier]
            assert held >= hashes, "removed what was not stored"
            held -= hashes

    async def finished(self, *request_ids: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not self.last.keys() >= set(request_ids):
                await self._next()

    async def started(self, request_id: str, num_tokens: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.tokens.get(request_id, [])) < num_tokens:
                await self._next()

    async def _next(self) -> None:
        self._delivery.clear()
        await self._delivery.wait()


def hidden_states(folder: Path, prompt: list[int], pooling: str) -> np.ndarray:
    """Those of transformers: the last token's, or the mean of all."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        states = model(torch.tensor([prompt])).last_hidden_state[0]
    pooled = states[-1] if pooling == "last" else states.mean(0)
    found: np.ndarray = pooled.numpy()
    return found


def embedding_of(sink: Sink, request_id: str) -> np.ndarray:
    """What a request with `pooling` ended with."""
    output = sink.last[request_id]
    assert output.finish_reason == "stop"
    assert output.token_ids == []
    assert output.embedding is not None
    return np.frombuffer(output.embedding, dtype="<f4")


def make_engine(
    folder: Path,
    *,
    device: str = "cpu",
    hash_salt: str = "tiny",
    fingerprint: str = "tiny",
    runner_class: type[ModelRunner] | None = None,
    **settings: Any,
) -> TorchEngine:
    """A small engine; `settings` are those of `EngineConfig`."""
    config: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "block_size": 8,
        "kv_cache_tokens": 1024,
        "max_batch_size": 8,
        "max_num_batched_tokens": 256,
        "max_waiting": 32,
        "num_threads": 1,
        **settings,
    }
    return TorchEngine(
        folder,
        EngineConfig(**config),
        device,
        hash_salt=hash_salt,
        fingerprint=fingerprint,
        runner_class=runner_class,
    )


@asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[tuple[TorchEngine, Sink]]:
    """An engine that is consistent, with nothing held, when the test is over. See `make_engine`."""
    engine, sink = make_engine(folder, **options), Sink()
    await engine.start(sink)
    try:
        yield engine, sink
        await settled(engine)
        engine.check_integrity()
        for tier, hashes in sink.held.items():
            assert set(engine.snapshot(tier)) == hashes
    finally:
        await engine.close()
    engine.check_integrity()
    assert engine.load().active_blocks == 0


async def settled(engine: TorchEngine) -> None:
    """Wait until nothing runs, waits or is held by a step under way, and all of it is delivered."""
    for _ in range(int(DEADLINE_S / 0.005)):
        load = engine.load()
        if not (load.num_running or load.num_waiting or load.active_blocks):
            break
        await asyncio.sleep(0.005)
    else:
        raise TimeoutError(f"still busy: {engine.load()}")
    await asyncio.sleep(0.005)  # deliveries under way
