"""Guided decoding: whatever a random model would like to say, what it says fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from serving.protocol import Guide, SamplingParams
from tokenizers import Tokenizer
from transformers import LlamaConfig
from unit.engine.torch_rig import (
    SIZES,
    Sink,
    greedy,
    random_prompts,
    request,
    running,
    save_model,
)
from unit.frontend.fakes import write_tokenizer

EOS = 1
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["fox", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 30},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["kind", "age", "tags"],
        "additionalProperties": False,
    }
)
JSON = Guide("json_schema", SCHEMA)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 20 embeddings more than its tokenizer has tokens."""
    folder = write_tokenizer(tmp_path_factory.mktemp("guided"))
    num_tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return save_model(folder, LlamaConfig(**{**SIZES, "vocab_size": num_tokens + 20}))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def guided(guide: Guide, max_tokens: int = 100, **more: Any) -> SamplingParams:
    more = {"stop_token_ids": (EOS,), **more}
    return SamplingParams(max_tokens=max_tokens, guide=guide, **more)


def regex(text: str) -> Guide:
    return Guide("regex", text)


def text_of(sink: Sink, tokenizer: Tokenizer, request_id: str) -> str:
    text: str = tokenizer.decode(sink.tokens[request_id], skip_special_tokens=False)
    return text


async def test_a_random_model_writes_what_the_schema_asks_for(
    model: Path, tokenizer: Tokenizer
) -> None:
    prompts = random_prompts([9] * 8)
    # It likes white space more than models do that were trained.
    async with running(model, max_model_len=512, kv_cache_tokens=4096) as (engine, sink):
        for i, prompt in enumerate(prompts):
            sampling = guided(JSON, 500, seed=i, temperature=1.5, logprobs=1)
            engine.submit(request(str(i), prompt, sampling))
        await sink.finished(*(str(i) for i in range(len(prompts))))
    answers = [json.loads(text_of(sink, tokenizer, str(i))) for i in range(len(prompts))]
    for answer in answers:
        assert set(answer) == {"kind", "age", "tags"}
        assert answer["kind"] in ("fox", "dog")
        assert 0 <= answer["age"] <= 30
        assert len(answer["tags"]) <= 3
    assert len({str(answer) for answer in answers}) > 4
    assert {last.finish_reason for last in sink.last.values()} == {"stop"}
    assert all(len(sink.logprobs[r]) == len(sink.tokens[r]) for r in sink.last)


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (regex(r"[a-c]{3}-\d{2}"), r"[a-c]{3}-\d{2}"),
        (Guide("grammar", 'start: "<" WORD ">"\nWORD: /[xyz]{2,4}/'), r"<[xyz]{2,4}>"),
    ],
)
async def test_expressions_and_grammars_end_by_themselves_without_an_end_token(
    model: Path, tokenizer: Tokenizer, guide: Guide, pattern: str
) -> None:
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        engine.submit(request("r", prompt, guided(guide, temperature=0, stop_token_ids=())))
        await sink.finished("r")
    assert re.fullmatch(pattern, text_of(sink, tokenizer, "r"))
    assert sink.last["r"].finish_reason == "stop"
    assert sink.last["r"].stop_token_id is None


async def test_text_ends_where_the_grammar_accepts_and_not_before_min_tokens(
    model: Path, tokenizer: Tokenizer
) -> None:
    """A model that wants nothing but to stop."""
    [prompt] = random_prompts([5])
    eager: dict[str, Any] = {"logit_bias": ((EOS, 100.0),), "temperature": 0}
    async with running(model) as (engine, sink):
        plain = SamplingParams(max_tokens=9, stop_token_ids=(EOS,), **eager)
        engine.submit(request("plain", prompt, plain))
        engine.submit(request("guided", prompt, guided(regex("[ab]{3,9}"), **eager)))
        engine.submit(request("longer", prompt, guided(regex("[ab]{3,9}"), min_tokens=6, **eager)))
        engine.submit(request("all", prompt, guided(regex("[ab]{3}"), min_tokens=50, **eager)))
        await sink.finished("plain", "guided", "longer", "all")
    assert sink.tokens["plain"] == []
    assert len(text_of(sink, tokenizer, "guided")) == 3
    assert sink.last["guided"].stop_token_id == EOS
    assert len(sink.tokens["longer"]) == 6
    assert len(text_of(sink, tokenizer, "all")) == 3
    assert {last.finish_reason for last in sink.last.values()} == {"stop"}


async def test_a_stop_token_that_the_grammar_also_uses_does_not_cut_the_text(
    model: Path, tokenizer: Tokenizer
) -> None:
    [prompt] = random_prompts([5])
    a = tokenizer.token_to_id("a")
    async with running(model) as (engine, sink):
        sampling = guided(regex("b[ac]{4}a"), stop_token_ids=(EOS, a), temperature=0)
        engine.submit(request("r", prompt, sampling))
        await sink.finished("r")
    # The last `a` is the only way on: it stops the text as it would end it.
    assert re.fullmatch("b[ac]{4}", text_of(sink, tokenizer, "r"))
    assert sink.last["r"].stop_token_id == a


async def test_max_tokens_ends_a_guided_text_too(model: Path) -> None:
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        engine.submit(request("r", prompt, guided(JSON, 3, temperature=0)))
        await sink.finished("r")
    assert len(sink.tokens["r"]) == 3
    assert sink.last["r"].finish_reason == "length"


async def test_guided_and_other_requests_do_not_disturb_each_other(model: Path) -> None:
    prompts = random_prompts([7, 12, 20])
    kinds = [guided(JSON, seed=1), SamplingParams(30, seed=2), guided(regex("[ab]{20}"), seed=3)]
    together, alone = Sink(), Sink()
    async with running(model) as (engine, sink):
        together = sink
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            engine.submit(request(str(i), prompt, kind))
        await sink.finished("0", "1", "2")
    async with running(model) as (engine, sink):
        alone = sink
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            engine.submit(request(str(i), prompt, kind))
            await sink.finished(str(i))
    assert together.tokens == alone.tokens


async def test_preemption_and_continuation_elsewhere_change_nothing(model: Path) -> None:
    prompts = random_prompts([40, 40, 40])
    kinds = [guided(JSON, 60, seed=i, temperature=1.2) for i in range(3)]
    async with running(model) as (engine, sink):
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            engine.submit(request(str(i), prompt, kind))
        await sink.finished("0", "1", "2")
    expected, expected_last = sink.tokens, sink.last
    async with running(model, kv_cache_tokens=144) as (engine, sink):
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            engine.submit(request(str(i), prompt, kind))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
    assert sink.tokens == expected
    async with running(model) as (engine, sink):
        engine.submit(request("0", prompts[0], kinds[0], phase="prefill"))
        await sink.finished("0")
        assert sink.tokens["0"] == expected["0"][:1]
        assert sink.last["0"].finish_reason == "length"
        engine.kv.release("0")
        for known in (1, 5):
            so_far = prompts[0] + expected["0"][:known]
            name = f"from-{known}"
            engine.submit(request(name, so_far, kinds[0], num_prompt_tokens=len(prompts[0])))
            await sink.finished(name)
            assert sink.tokens[name] == expected["0"][known:]
            assert sink.last[name].finish_reason == expected_last["0"].finish_reason


async def test_what_cannot_be_guided_ends_with_its_own_error(model: Path, tmp_path: Path) -> None:
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        engine.submit(request("bad", prompt, guided(regex("("))))
        wrong = [*prompt, 7]
        engine.submit(request("no", wrong, guided(JSON), num_prompt_tokens=len(prompt)))
        engine.submit(request("good", prompt, greedy(5)))
        await sink.finished("bad", "no", "good")
    for name, what in (("bad", "unclosed group"), ("no", "does not fit its grammar")):
        error = sink.last[name].error
        assert error is not None
        assert error.kind == "InvalidRequest"
        assert what in error.message
    assert len(sink.tokens["good"]) == 5
    bare = save_model(tmp_path / "bare")
    async with running(bare) as (engine, sink):
        engine.submit(request("r", prompt, guided(JSON)))
        await sink.finished("r")
        assert sink.last["r"].error is not None
        assert "tokenizer" in sink.last["r"].error.message


async def test_a_guided_request_can_be_aborted_at_any_time(model: Path) -> None:
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        engine.submit(request("at-once", prompt, guided(JSON)))
        engine.abort("at-once")
        engine.submit(request("later", prompt, guided(regex("[ab]{100}"))))
        await sink.started("later", 3)
        engine.abort("later")
        await sink.finished("at-once", "later")
    assert {last.finish_reason for last in sink.last.values()} == {"cancelled"}


@pytest.mark.parametrize(
    "guide",
    [
        regex(r"a[^\s\S]b"),
        Guide("json_schema", '{"$ref": "#"}'),
        Guide("json_schema", '{"type": "array", "uniqueItems": true}'),
    ],
)
async def test_guide_that_nothing_fits_never_ends_as_if_it_was_complete(
    model: Path, guide: Guide
) -> None:
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        for name in ("first", "next"):
            engine.submit(request(name, prompt, guided(guide, temperature=0)))
            await sink.finished(name)
    for last in sink.last.values():
        assert last.finish_reason == "error"
        assert last.error is not None
        assert (last.error.kind, last.error.code) == ("InvalidRequest", "invalid_grammar")


@pytest.mark.parametrize(
    "guide",
    [
        regex("a{1000000}"),
        Guide("grammar", "start: " + " | ".join(f'"w{i}" r' for i in range(3000)) + '\nr: "x"'),
        # Only the end token is left after "ab", and the grammar does not accept it.
        Guide("grammar", 'start: "ab" C\nC: /[^\\s\\S]/'),
        Guide(
            "json_schema",
            '{"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"], '
            '"$defs": {"x": {"$ref": "#/$defs/x"}}}',
        ),
    ],
)
async def test_guide_that_fails_on_the_way_is_the_error_of_its_author_and_is_not_kept(
    model: Path, guide: Guide
) -> None:
    """The frontend would refuse it. Each of the engine's answers to it is an error of its own."""
    [prompt] = random_prompts([5])
    async with running(model) as (engine, sink):
        for name in ("first", "next"):
            engine.submit(request(name, prompt, guided(guide, temperature=0)))
            await sink.finished(name)
        engine.submit(request("other", prompt, guided(regex("[ab]{3}"), temperature=0)))
        await sink.finished("other")
    for name in ("first", "next"):
        error = sink.last[name].error
        assert error is not None
        assert (error.kind, error.code) == ("InvalidRequest", "invalid_grammar")
    assert sink.last["other"].finish_reason == "stop"
