"""What a guide can be used for is found out in another process, and at no other request's cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from serving.errors import InvalidRequest
from serving.grammar.check import GuideChecker
from serving.protocol import Guide
from unit.frontend.fakes import write_tokenizer

OPTIONAL = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2500)}}
CHAIN = {
    "$ref": "#/$defs/a0",
    "$defs": {
        **{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(4000)},
        "a4000": {"type": "string"},
    },
}
RULES = "\n".join(f'r{i}: r{i + 1} "x"' for i in range(2676))
ALTERNATIVES = "start: " + " | ".join(f'"w{i}" r' for i in range(3000)) + '\nr: "x"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("checked"))


@pytest.fixture
async def checker(folder: Path) -> AsyncIterator[GuideChecker]:
    checker = GuideChecker(folder, cpu_s=1.0)
    yield checker
    await checker.close()


async def refusal(checker: GuideChecker, guide: Guide) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(guide, "guided")
    assert caught.value.param == "guided"
    assert caught.value.code == "invalid_grammar"
    return caught.value.message


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (Guide("json_schema", '{"$ref": "#"}'), "nothing can follow"),
        (Guide("regex", r"a[^\s\S]b"), "nothing can follow"),
        (Guide("regex", "a{1000000}"), ""),
        (Guide("grammar", 'start: "ab" C\nC: /[^\\s\\S]/'), "nothing can follow"),
        (Guide("grammar", ALTERNATIVES), "items"),
        (Guide("grammar", 'start: a\na: a a | "x" | a a a'), "takes too long"),
        (Guide("json_schema", json.dumps(OPTIONAL)), "items"),
        (Guide("json_schema", json.dumps(CHAIN)), "nested too deeply"),
        (Guide("grammar", f'start: r0\n{RULES}\nr2676: "y"'), "nested too deeply"),
        (Guide("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Guide("regex", "(a"), "unclosed group"),
        (Guide("grammar", "root ::= missing"), "not found"),
        (Guide("structural_tag", '{"format": {"type": "tag"}}'), "missing"),
    ],
)
async def test_guide_that_no_engine_can_follow_is_refused_with_the_reason(
    checker: GuideChecker, guide: Guide, reason: str
) -> None:
    assert reason in await refusal(checker, guide)
    await checker.check(Guide("regex", "[ab]+"), "guided")  # others can still be checked


@pytest.mark.parametrize(
    "guide",
    [
        Guide("json_schema", '{"type": "string", "format": "phone"}'),
        Guide("json_schema", '{"type": "object"}'),
        Guide("json_schema", '{"properties": {"format": {"const": "phone"}}}'),
        Guide("regex", "a/b"),
        Guide("grammar", 'start: "a"'),
        Guide("grammar", 'root ::= "a" digit{2,3}\ndigit ::= [0-9]'),
    ],
)
async def test_guide_that_can_be_followed_is_accepted(checker: GuideChecker, guide: Guide) -> None:
    await checker.check(guide, "guided")


async def test_guide_of_too_many_bytes_is_refused_unread(folder: Path) -> None:
    checker = GuideChecker(folder, max_bytes=100)
    with pytest.raises(InvalidRequest, match="guide_bytes"):
        await checker.check(Guide("regex", "a" * 101), "guided_regex")


async def test_result_is_kept(checker: GuideChecker) -> None:
    guide = Guide("grammar", f'start: r0\n{RULES}\nr2676: "y"')
    first = await refusal(checker, guide)
    await checker.close()
    assert await refusal(checker, guide) == first  # without a process


async def test_lost_process_is_replaced(folder: Path, checker: GuideChecker) -> None:
    await checker.check(Guide("regex", "a"), "guided")
    await checker.close()
    await checker.check(Guide("regex", "b"), "guided")


async def test_event_loop_goes_on_while_a_hostile_guide_is_compiled(checker: GuideChecker) -> None:
    """A stream of tokens every millisecond, beside guides that use up their time or stack."""
    await checker.check(Guide("regex", "warm"), "guided")
    numbers = "".join(f"(?:.*{i}.*)&" for i in range(2))
    hostile = [
        Guide("json_schema", json.dumps({"type": "integer", "multipleOf": 999_983})),
        Guide("grammar", f'start: r0\n{RULES}\nr2676: "y"'),
        Guide("regex", f"({numbers[:-1]}a{{1,900}}){{900}}"),
        Guide("grammar", ALTERNATIVES),
    ]
    checks = asyncio.gather(*(checker.check(g, "guided") for g in hostile), return_exceptions=True)
    gaps, last = [], time.monotonic()
    while not checks.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert any(isinstance(result, InvalidRequest) for result in await checks)
    gaps.sort()
    assert gaps[int(len(gaps) * 0.95)] < 0.03


async def test_compile_time_is_bounded(folder: Path) -> None:
    checker = GuideChecker(folder, cpu_s=0.05)
    try:
        guide = Guide("json_schema", json.dumps({"type": "integer", "multipleOf": 999_983}))
        assert "guide_compile_s" in await refusal(checker, guide)
    finally:
        await checker.close()
