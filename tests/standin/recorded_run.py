"""Test code. A short run of the adapter on the stand-in, for `coverage.py`; in its own process.

python recorded_run.py FOLDER
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from integration.tiny_model import save_tiny_model
from serving import config as configs
from serving.engine.manifest import ENGINE_FORMAT, BuildCheck, EngineManifest
from serving.engine.trtllm.build import llm_args, target
from serving.engine.trtllm.engine import TensorRtLlmEngine
from serving.engine.trtllm.versions import parse_version
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams

DEADLINE_S = 60.0
BLOCK_SIZE = 32  # the only one that 1.0 has


class Sink:
    def __init__(self) -> None:
        self.last: dict[str, EngineOutput] = {}
        self.tokens: dict[str, list[int]] = {}
        self.events: list[KvEvent] = []
        self.news = asyncio.Event()

    def __call__(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        self.events += events
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.last[output.request_id] = output
        self.news.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()


def manifest_for(folder: Path, version: str) -> EngineManifest:
    config = json.loads((folder / "config.json").read_text())
    return EngineManifest(
        format=ENGINE_FORMAT,
        fingerprint="recorded",
        backend="tensorrt_llm",
        device="cpu",
        model_id="tiny",
        commit=None,
        architecture="LlamaForCausalLM",
        dtype="float32",
        kv_layout=None,
        model_max_len=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        eos_token_ids=[config["eos_token_id"]],
        bos_token_id=config["bos_token_id"],
        pad_token_id=config["pad_token_id"],
        hash_salt="tiny",
        weights={},
        versions={},
        check=BuildCheck(
            kind="checkpoint",
            num_positions=0,
            max_abs_diff=0.0,
            argmax_agreement=1.0,
            tolerance=0.0,
        ),
        created=0,
        flow="pytorch",
        stamp={"tensorrt_llm": version},
        llm_args={role: f"llm_args-{role}.yaml" for role in ("agg", "prefill", "decode")},
    )


async def run(folder: Path, version: str) -> None:
    config = configs.parse(
        {
            "engine": {
                "backend": "tensorrt_llm",
                "device": "cpu",
                "block_size": BLOCK_SIZE,
                "max_model_len": 256,
                "max_batch_size": 4,
                "kv_cache_tokens": 2048,
            },
            "kv_transfer": {"transport": "ucx"},
            "tensorrt_llm": {"guided_decoding": "none"},
        }
    )
    manifest = manifest_for(folder, version)
    engines: dict[str, tuple[TensorRtLlmEngine, Sink]] = {}
    for role in ("agg", "prefill", "decode"):
        text = llm_args.render(
            config,
            role,
            version=parse_version(version),
            flow="pytorch",
            spread=target.Parallelism(),
            dtype="float32",
        )
        (folder / f"llm_args-{role}.yaml").write_text(text)
        engine = TensorRtLlmEngine(
            folder, manifest, role=role, instance_id=f"{role}-0", engine=config.engine
        )
        sink = Sink()
        await engine.start(sink)
        engines[role] = engine, sink
    try:
        await _serve(engines)
    finally:
        for engine, _ in engines.values():
            await engine.close()


async def _serve(engines: dict[str, tuple[TensorRtLlmEngine, Sink]]) -> None:
    prompt = [5 + i % 200 for i in range(70)]
    greedy = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2)
    drawn = SamplingParams(
        max_tokens=6,
        min_tokens=2,
        temperature=0.8,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        stop_token_ids=(2, 3),
    )
    agg, told = engines["agg"]
    agg.submit(EngineRequest("greedy", prompt, len(prompt), greedy))
    agg.submit(EngineRequest("drawn", prompt[::-1], len(prompt), drawn))
    stops = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(2, 3))
    agg.submit(EngineRequest("stops", prompt[:40], 40, stops))
    await told.until(lambda: {"greedy", "drawn", "stops"} <= told.last.keys())
    long = SamplingParams(max_tokens=100, temperature=0.0)
    agg.submit(EngineRequest("aborted", prompt[3:], len(prompt) - 3, long))
    await told.until(lambda: told.tokens.get("aborted"))
    agg.abort("aborted")
    await told.until(lambda: "aborted" in told.last and told.events)

    prefill, prefilled = engines["prefill"]
    prefill.submit(EngineRequest("handed", prompt, len(prompt), greedy, "prefill"))
    await prefilled.until(lambda: "handed" in prefilled.last)
    first, params = prefilled.tokens["handed"], prefilled.last["handed"].kv_transfer_params
    decode, decoded = engines["decode"]
    decode.submit(EngineRequest("handed", prompt + first, len(prompt), greedy, "decode", params))
    await decoded.until(lambda: "handed" in decoded.last)
    assert first + decoded.tokens["handed"] == told.tokens["greedy"], "other tokens than alone"
    assert decode.transfers.kv_transfers == 1, decode.transfers


def main() -> None:
    from tensorrt_llm.version import __version__

    # Without -P the repository's own copy would be found first, as another version.
    assert __version__ == sys.argv[2], f"this is {__version__}"
    folder = save_tiny_model(Path(sys.argv[1]))
    asyncio.run(run(folder, __version__))


if __name__ == "__main__":
    main()
