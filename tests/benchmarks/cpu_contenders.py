"""What `engine_cpu` compares: the torch engine, `transformers` `generate`, and llama.cpp.

Each takes a batch of prompts and generates the same number of tokens for all of them, greedily and
without regard to stop tokens, and says how long each step took in which all of them got a token.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from serving.engine.base import EngineLoad
from serving.engine.manifest import load_manifest
from serving.engine.torch.engine import TorchEngine
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams
from transformers import AutoModelForCausalLM, LogitsProcessorList

BLOCK_SIZE = 16


class Ours:
    """The engine, driven through its public interface."""

    def __init__(self, engine_dir: Path, threads: int, max_model_len: int) -> None:
        self._engine = TorchEngine(
            engine_dir,
            max_model_len=max_model_len,
            block_size=BLOCK_SIZE,
            kv_cache_tokens=16 * max_model_len,
            max_batch_size=8,
            max_num_batched_tokens=512,
            max_waiting=64,
            dtype=load_manifest(engine_dir).dtype,
            num_threads=threads,
            hash_salt="benchmark",
            fingerprint="benchmark",
        )
        self.cached_tokens = 0  # of the last batch
        self._finished = asyncio.Event()
        self._pending = 0
        self._count = 0
        self._step_ends: list[tuple[float, int]] = []  # when, and how many got a token

    async def start(self) -> None:
        await self._engine.start(self._receive)

    async def close(self) -> None:
        await self._engine.close()

    async def run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        self._finished.clear()
        self._step_ends.clear()
        self._pending, self.cached_tokens = len(prompts), 0
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0)
        for prompt in prompts:
            self._count += 1
            request = EngineRequest(str(self._count), prompt, len(prompt), sampling)
            self._engine.submit(request)
        await self._finished.wait()
        ends = [end for end, num_outputs in self._step_ends if num_outputs == len(prompts)]
        return [after - before for before, after in pairwise(ends)]

    def _receive(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: EngineLoad
    ) -> None:
        del events, load
        if outputs:
            self._step_ends.append((time.perf_counter(), len(outputs)))
        for output in outputs:
            assert output.error is None, output.error
            self.cached_tokens += output.cached_tokens or 0
            self._pending -= output.finish_reason is not None
        if self._pending == 0:
            self._finished.set()


class Generate:
    """`generate` in float32 with its default attention and cache."""

    name = "transformers generate"

    def __init__(self, engine_dir: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(engine_dir, dtype=torch.float32)
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None  # as many tokens as asked for

    async def run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        ends: list[float] = []

        def note_time(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends.append(time.perf_counter())
            return scores

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([note_time]),
            )
        assert out.shape[1] == longest + num_tokens
        return [after - before for before, after in pairwise(ends)]


class LlamaCpp:
    """llama.cpp's server inside this process, on the GGUF as it was downloaded."""

    def __init__(self, gguf: Path, threads: int, max_model_len: int, max_batch: int) -> None:
        """Raises ImportError where `xllamacpp` is not installed."""
        import xllamacpp

        self.name = f"llama.cpp ({gguf.stem.rsplit('.', 1)[-1]}, xllamacpp {xllamacpp.__version__})"
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_parallel, params.n_ctx = max_batch, max_batch * max_model_len
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    async def run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        return await asyncio.to_thread(self._run, prompts, num_tokens)

    def _run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Its requests start one after the other: a step counts between the last one's first
        token and the first one's last."""
        ends: list[list[float]] = [[] for _ in prompts]
        failures: list[str] = []

        def complete(index: int) -> None:
            def receive(chunk: Any) -> bool:
                content = json.loads(chunk) if isinstance(chunk, str) else chunk
                if isinstance(content, dict) and "error" in content:
                    failures.append(str(content["error"]))
                # The last chunk tells of the end and brings no token.
                elif not (isinstance(content, dict) and content.get("stop")):
                    ends[index].append(time.perf_counter())
                return False

            request = {
                "prompt": prompts[index],
                "n_predict": num_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
                "stream": True,
                "return_tokens": True,
            }
            self._server.handle_completions(request, receive)

        threads = [threading.Thread(target=complete, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures or min(map(len, ends)) < num_tokens:
            raise RuntimeError(f"llama.cpp generated {list(map(len, ends))} tokens: {failures}")
        first, last = max(each[0] for each in ends), min(each[-1] for each in ends)
        longest = max(ends, key=lambda each: sum(first <= end <= last for end in each))
        within = [end for end in longest if first <= end <= last]
        return [after - before for before, after in pairwise(within)]
