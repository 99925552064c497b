"""Guided decoding and log-probabilities of prompts on a real GPU, through the whole engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from serving.protocol import Guide, SamplingParams
from tokenizers import Tokenizer
from transformers import LlamaConfig
from unit.engine.torch_rig import SIZES, greedy, random_prompts, request, running, save_model
from unit.frontend.fakes import write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "kind": {"enum": ["fox", "dog"]}},
        "required": ["age", "kind"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("features"))
    num_tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return save_model(folder, LlamaConfig(**{**SIZES, "vocab_size": num_tokens + 20}))


async def test_guided_rows_match_their_schema_beside_rows_that_run_ahead(model: Path) -> None:
    prompts = random_prompts([9, 20, 33, 5, 12, 40])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    expected: dict[str, list[int]] = {}
    async with running(model, device="cuda", max_model_len=512, kv_cache_tokens=8192) as (
        engine,
        sink,
    ):
        for turn in ("alone", "together"):
            for i, prompt in enumerate(prompts):
                sampling = greedy(60)
                if i % 2:
                    guide = Guide("json_schema", SCHEMA)
                    sampling = SamplingParams(400, seed=i, guide=guide, stop_token_ids=(1,))
                elif turn == "alone":
                    continue
                engine.submit(request(f"{turn}-{i}", prompt, sampling))
                if turn == "alone":
                    await sink.finished(f"{turn}-{i}")
            await sink.finished(*(f"together-{i}" for i in range(6) if turn == "together"))
        expected = sink.tokens
    for i in (1, 3, 5):
        answer = json.loads(tokenizer.decode(expected[f"together-{i}"]))
        assert set(answer) == {"age", "kind"}
        assert sink.last[f"together-{i}"].finish_reason == "stop"
    assert all(len(expected[f"together-{i}"]) == 60 for i in (0, 2, 4))


async def test_prompt_logprobs_equal_those_on_the_cpu(model: Path) -> None:
    prompts = random_prompts([50, 9, 1, 77])
    logprobs = {}
    for device in ("cpu", "cuda"):
        async with running(model, device=device, max_num_batched_tokens=32) as (engine, sink):
            engine.submit(request("other", prompts[0], greedy(40)))
            for i, prompt in enumerate(prompts):
                engine.submit(request(str(i), prompt, greedy(4, prompt_logprobs=2)))
            await sink.finished("other", *(str(i) for i in range(len(prompts))))
        logprobs[device] = sink.prompt_logprobs
    for i, prompt in enumerate(prompts):
        on_cpu, on_cuda = logprobs["cpu"][str(i)], logprobs["cuda"][str(i)]
        assert [entry.token_id for entry in on_cuda] == prompt[1:]
        for one, other in zip(on_cpu, on_cuda, strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=1e-3)
