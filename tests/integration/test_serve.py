"""The main job on the real model: from a model ID to tokens, over real etcd, NATS and UCX."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from integration.deployment import DEFAULT_MODEL, Deployment, running, share_results

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "To make a cup of tea, first",
    "The largest planet in the solar system is",
    "In 1969, astronauts",
    "A haiku about autumn:",
    "The opposite of cold is",
    "import numpy as np\n\nx = np",
    "Photosynthesis is the process by which",
    "My favourite food is",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "SELECT name FROM users WHERE",
    "Q: What is 7 times 8?\nA:",
    "The history of the Roman Empire begins",
    "Roses are red, violets are",
    "Les trois mousquetaires sont",
]
LONG = "The following is a careful and detailed story about a lighthouse keeper. " * 12


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, default_results: Path) -> Any:
    """`serve_disagg` as a newcomer runs it; small chunks so that prompts are chunked."""
    deployment = Deployment(tmp_path_factory.mktemp("serve"), engine={"max_num_batched_tokens": 64})
    share_results(default_results, deployment.directory / "results")
    with running(deployment, "serve_disagg"):
        yield deployment


@pytest.fixture(scope="module")
def reference(service: Deployment) -> Any:
    """Greedy continuations by `transformers` `generate`, fp32, from the *source* GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [gguf] = (service.directory / "results" / "models").rglob("*.gguf")
    [engine] = (service.directory / "results" / "engines").glob("*/engine.json")
    tokenizer = AutoTokenizer.from_pretrained(engine.parent)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()

    def generate(prompt: str, num_tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=2, pad_token_id=2
            )
        return str(
            tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        )

    return generate


def test_second_serve_is_a_no_op(service: Deployment) -> None:
    before = service.pids()
    done = service.snakemake("serve_disagg")
    assert "Nothing to be done" in done.stdout
    assert service.pids() == before


def test_smoke_test_passes_in_a_second_shell(service: Deployment) -> None:
    done = service.snakemake("smoke_test")
    assert "UCX" in done.stdout.upper()


def test_greedy_output_is_token_identical_to_generate(service: Deployment, reference: Any) -> None:
    """20 prompts, 8 at a time, then again with prefix hits, then a chunked one."""
    expected = [reference(prompt, 16) for prompt in PROMPTS]
    moved_before = kv_bytes(service)
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: text_of(service.complete(prompt)), PROMPTS))
        assert answers == expected
    answer = service.complete(LONG)
    assert answer["usage"]["prompt_tokens"] > 128  # two chunks of 64 and more
    assert text_of(answer) == reference(LONG, 16)
    again = service.complete(LONG)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert text_of(again) == text_of(answer)
    service.wait("the report of the bytes", lambda _: kv_bytes(service) > moved_before)


def test_stream_equals_the_whole_answer(service: Deployment) -> None:
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60).json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    texts, usage, done = [], None, False
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as lines:
        for line in lines.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            texts += [c["delta"].get("content") or "" for c in chunk["choices"]]
    assert done
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert usage == whole["usage"] | {"prompt_tokens_details": usage["prompt_tokens_details"]}


def test_guided_samples_fit_their_schema_and_share_the_prompt(service: Deployment) -> None:
    """Through prefill, hand-over and decode: the matcher goes on where the first token left it."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    cached = total(service, "serving_cached_tokens_total")
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": f"{LONG}Who is the keeper, and how old?"}],
        "n": 3,
        "seed": 1,
        "max_tokens": 200,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "keeper", "schema": schema, "strict": True},
        },
    }
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert set(json.loads(choice["message"]["content"])) == {"name", "age"}
        assert choice["finish_reason"] == "stop"
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert prompt_tokens > 128
    # Two of three found all full blocks of the prompt (of 32 tokens at most) computed.
    gained = total(service, "serving_cached_tokens_total") - cached
    assert gained >= 2 * (prompt_tokens - 32)


def test_prompt_logprobs_equal_those_of_the_model(service: Deployment, reference: Any) -> None:
    """What the model itself says greedily is its likeliest continuation, token by token."""
    continuation = reference(PROMPTS[0], 8)
    text = PROMPTS[0] + continuation
    alone = service.complete(PROMPTS[0], max_tokens=1)["usage"]["prompt_tokens"]
    answer = service.complete(text, max_tokens=0, echo=True, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == text
    assert logprobs["token_logprobs"][0] is None
    pairs = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    assert len(pairs) == answer["usage"]["prompt_tokens"] == alone + 8
    for own, top in pairs[alone:]:
        assert own == max(top.values())


def test_disconnect_frees_every_block(service: Deployment) -> None:
    body = {"model": DEFAULT_MODEL, "prompt": "Count: one, two,", "max_tokens": 800}
    body |= {"stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: an iterator that is dropped closes the response
        next(lines)
        service.wait("it is running", lambda r: any(i["num_running"] for i in r["instances"]))
    service.wait(
        "all blocks are free again",
        lambda r: all(i["active_blocks"] == 0 for i in r["instances"]),
    )


BAD: list[tuple[bytes, int]] = [
    (b"{not json", 400),
    (b"", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b'{"model": "M"}', 400),
    (b'{"model": "M", "messages": []}', 400),
    (b'{"model": "M", "messages": "hi"}', 400),
    (b'{"model": "M", "messages": [{"role": "user"}]}', 400),
    (b'{"model": "M", "messages": [{"role": "boss", "content": "x"}]}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "x"}], "max_tokens": -5}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "x"}], "max_tokens": "9"}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "x"}], "temperature": 9}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "\\u0000"}]}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    (b'{"model": "M", "messages": [{"role": "user", "content": "x"}], "guided_regex": "("}', 400),
    (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
    (b'{"model": "M", "messages": [{"role": "user", "content": "' + b"long " * 3000 + b'"}]}', 400),
    (
        b'{"model": "M", "messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}',
        413,
    ),
]


def test_bad_input_gets_a_4xx_with_an_openai_error(service: Deployment) -> None:
    wrong = []
    for body, status in BAD:
        body = body.replace(b'"M"', json.dumps(DEFAULT_MODEL).encode())
        response = httpx.post(
            f"{service.url}/v1/chat/completions",
            content=body,
            headers={"content-type": "application/json"},
            timeout=30,
        )
        if response.status_code != status:
            wrong.append((body[:120], response.status_code, response.text))
            continue
        error = response.json()["error"]
        assert error["message"], body[:120]
        assert set(error) == {"message", "type", "param", "code"}
    assert not wrong
    assert text_of(service.complete("The capital of France is", max_tokens=2))
    service.wait("nothing leaked", lambda r: all(i["active_blocks"] == 0 for i in r["instances"]))


def test_dry_run_changes_nothing(service: Deployment) -> None:
    before, pids = tree(service.directory), service.pids()
    service.snakemake("-n", "serve_agg_router")
    service.snakemake("-n", "serve_disagg", "--config", "frontend-port=8123")
    assert tree(service.directory) == before
    assert service.pids() == pids


def tree(directory: Path) -> dict[str, float]:
    """Files under `results/` and `run/` that only jobs may touch, with their times."""
    return {
        str(path): path.stat().st_mtime
        for part in ("results", "run")
        for path in (directory / part).rglob("*")
        if path.is_file() and path.suffix in {".up", ".json", ".conf", ".safetensors"}
    }


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def total(service: Deployment, metric: str) -> float:
    page = httpx.get(f"{service.url}/metrics", timeout=30).text
    [line] = [line for line in page.splitlines() if line.startswith(f"{metric} ")]
    return float(line.split()[1])


def kv_bytes(service: Deployment) -> int:
    return sum(i["kv_bytes_received"] for i in service.ready()["instances"] if i["kv_transport"])
