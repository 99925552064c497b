"""The engines that `engine_cpu` compares: torch, `transformers` `generate` and llama.cpp.

Each takes a batch of prompts and generates the same number of tokens for all of them, greedily and
without regard to stop tokens, and says how long each step took in which all of them got a token.

Each runs in a process of its own: this file, which reads and writes lines of JSON. In one process
the OpenMP runtime counts the threads of all pools together, and with more of them than cores it
gives up spinning, which doubles the time of a decode step of a small model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402
from serving.config import EngineConfig  # noqa: E402
from serving.engine.manifest import load_manifest  # noqa: E402
from serving.engine.torch.engine import TorchEngine  # noqa: E402
from serving.load_report import LoadReport  # noqa: E402
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams  # noqa: E402
from transformers import AutoModelForCausalLM, LogitsProcessorList  # noqa: E402

BLOCK_SIZE = 16
START_S, RUN_S = 120.0, 300.0


class Contender:
    """One of the classes below in a process of its own. A context manager."""

    def __init__(self, kind: str, path: Path, threads: int, max_model_len: int) -> None:
        """`kind` is `ours`, `generate` or `llama.cpp`; `path` the engine's folder, or the GGUF."""
        arguments = [kind, str(path), str(threads), str(max_model_len)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = ""
        self.cached_tokens = 0  # of the last batch

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    async def start(self) -> None:
        """Wait until it is ready. Raises ImportError where its library is not installed."""
        answer = await self._answer(START_S)
        if "missing" in answer:
            raise ImportError(answer["missing"])
        self.name = answer["name"]

    async def run(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[float]]:
        """Seconds until all is generated, and those of each step."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([prompts, num_tokens]) + "\n")
        self._process.stdin.flush()
        answer = await self._answer(RUN_S)
        self.cached_tokens = answer["cached_tokens"]
        return answer["seconds"], answer["steps"]

    async def _answer(self, within_s: float) -> dict[str, Any]:
        assert self._process.stdout
        async with asyncio.timeout(within_s):
            while line := await asyncio.to_thread(self._process.stdout.readline):
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        raise RuntimeError(f"it ended with {self._process.wait(5)}")


class Ours:
    """The engine, driven through its public interface."""

    def __init__(self, engine_dir: Path, threads: int, max_model_len: int) -> None:
        dtype: Any = load_manifest(engine_dir).dtype
        self.name = f"torch engine, {dtype}"
        self._engine = TorchEngine(
            engine_dir,
            EngineConfig(
                dtype=dtype,
                max_model_len=max_model_len,
                block_size=BLOCK_SIZE,
                kv_cache_tokens=16 * max_model_len,
                max_batch_size=8,
                max_num_batched_tokens=512,
                max_waiting=64,
                num_threads=threads,
            ),
            "cpu",
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
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
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
    cached_tokens = 0

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

    cached_tokens = 0

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
        generated = [0] * len(prompts)
        failures: list[str] = []

        def complete(index: int) -> None:
            def receive(chunk: Any) -> bool:
                content = json.loads(chunk) if isinstance(chunk, str) else chunk
                if "error" in content:
                    failures.append(str(content["error"]))
                # The last chunk tells of the end and brings no token.
                elif content["choices"][0]["finish_reason"]:
                    generated[index] = content["usage"]["completion_tokens"]
                else:
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
        # There are fewer chunks than tokens where bytes waited for the rest of a character.
        if failures or min(generated) < num_tokens:
            raise RuntimeError(f"llama.cpp generated {generated} tokens: {failures}")
        first, last = max(each[0] for each in ends), min(each[-1] for each in ends)
        longest = max(ends, key=lambda each: sum(first <= end <= last for end in each))
        within = [end for end in longest if first <= end <= last]
        return [after - before for before, after in pairwise(within)]


async def serve(kind: str, path: Path, threads: int, max_model_len: int) -> None:
    """Serve the requests on the standard input until it ends."""
    torch.set_num_threads(threads)
    contender: Ours | Generate | LlamaCpp
    if kind == "llama.cpp":
        try:
            contender = LlamaCpp(path, threads, max_model_len, max_batch=8)
        except ImportError as exc:
            print(json.dumps({"missing": str(exc)}), flush=True)
            return
    elif kind == "generate":
        contender = Generate(path)
    else:
        contender = Ours(path, threads, max_model_len)
        await contender.start()
    print(json.dumps({"name": contender.name}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        prompts, num_tokens = json.loads(line)
        started = time.perf_counter()
        steps = await contender.run(prompts, num_tokens)
        answer = {"seconds": time.perf_counter() - started, "steps": steps}
        print(json.dumps({**answer, "cached_tokens": contender.cached_tokens}), flush=True)
    if isinstance(contender, Ours):
        await contender.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one contender; engine_cpu.py starts it")
    parser.add_argument("kind", choices=["ours", "generate", "llama.cpp"])
    parser.add_argument("path", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("max_model_len", type=int)
    options = parser.parse_args()
    asyncio.run(serve(options.kind, options.path, options.threads, options.max_model_len))
