"""KV events and statistics of the stand-in have the contract's form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from unit.engine.trtllm.standin import standin_rig as rig


async def read(answers: Any) -> list[dict[str, Any]]:
    return [answer async for answer in answers]


async def test_events_describe_the_cache_in_the_contracts_form(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1000, "max_tokens": 256})
    with pytest.raises(AssertionError, match="not properly instantiated"):
        llm.get_kv_cache_events_async(timeout=0.1)
    await llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(8))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    assert [event["event_id"] for event in events] == list(range(len(events)))
    assert {event["window_size"] for event in events} == {256}
    assert events[0]["data"] == {"type": "created", "num_blocks_per_cache_level": [32, 0]}
    stored = [event["data"] for event in events[1:]]
    assert {data["type"] for data in stored} == {"stored"}
    blocks = [block for data in stored for block in data["blocks"]]
    assert set(blocks[0]) == {"type", "block_hash", "tokens", "cache_level", "priority"}
    assert set(blocks[0]["tokens"][0]) == {"type", "token_id", "token_extra_id"}
    told = [[token["token_id"] for token in block["tokens"]] for block in blocks]
    assert [token for tokens in told for token in tokens][: len(rig.PROMPT)] == rig.PROMPT
    # 37 prompt tokens and 7 of 8 new ones have KV: five blocks, and one partly filled.
    assert [len(tokens) for tokens in told] == [8] * 5 + [4]
    parent = None
    for data in stored:
        assert data["parent_hash"] == parent
        parent = data["blocks"][-1]["block_hash"]
    assert all(0 <= block["block_hash"] < 2**64 for block in blocks)

    for start in range(10):  # more than fits
        other = [start] + [7 + i % 90 for i in range(60)]
        await llm.generate_async(inputs=other, sampling_params=library.sampling(2))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    removed = [e["data"] for e in events if e["data"]["type"] == "removed"]
    gone = {value for data in removed for value in data["block_hashes"]}
    assert {block["block_hash"] for block in blocks} <= gone


async def test_an_iterator_that_timed_out_lives_again_with_the_next_request(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1000})
    await llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(2))
    assert await read(llm.get_kv_cache_events_async(timeout=0.1))
    answers = llm.get_kv_cache_events_async(timeout=0.1)
    llm._executor.events_result.put(json.dumps({"late": 1}))
    assert await read(answers) == [], "ended, whatever has come since"
    await llm.generate_async(inputs=rig.PROMPT[::-1], sampling_params=library.sampling(2))
    assert (await read(llm.get_kv_cache_events_async(timeout=0.1)))[0] == {"late": 1}


async def test_events_that_overflow_leave_a_gap(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1})
    for first in (5, 6, 7):
        prompt = [first, *rig.PROMPT]
        await llm.generate_async(inputs=prompt, sampling_params=library.sampling(6))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    ids = [event["event_id"] for event in events]
    assert ids == sorted(ids)
    assert len(ids) < ids[-1] + 1


async def test_evicted_blocks_go_to_host_memory_first(library: Any) -> None:
    layer_bytes = 8 * 2 * 2 * 2 * 16 * 4
    llm = library.llm(
        kv={"event_buffer_max_size": 1000, "max_tokens": 256, "host_cache_size": 4 * layer_bytes}
    )
    for start in range(10):
        other = [start] + [7 + i % 90 for i in range(60)]
        await llm.generate_async(inputs=other, sampling_params=library.sampling(2))
    events = [e["data"] for e in await read(llm.get_kv_cache_events_async(timeout=0.1))]
    assert events[0]["num_blocks_per_cache_level"] == [32, 4]
    updated = [data for data in events if data["type"] == "updated"]
    assert updated[0]["cache_level"] == {"type": "event_diff", "new_value": 1, "old_value": 0}
    assert any(data["type"] == "removed" for data in events)


@pytest.mark.parametrize("kv", [{}, {"event_buffer_max_size": 9, "enable_block_reuse": False}])
async def test_no_events_unless_there_is_a_buffer_and_reuse(library: Any, kv: Any) -> None:
    llm = library.llm(kv=kv)
    for _ in range(2):
        result = await llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(2))
    assert result.cached_tokens == (0 if kv else 32)
    assert await read(llm.get_kv_cache_events_async(timeout=0.05)) == []


async def test_statistics_are_the_contracts_json(library: Any) -> None:
    contract = json.loads((library.root / "tensorrt_llm" / "contract.json").read_text())["stats"]
    silent, llm = library.llm(), library.llm(enable_iter_perf_stats=True)
    assert await read(llm.get_stats_async(timeout=0.05)) == [], "nothing before the first request"
    for each in (silent, llm):
        await each.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(12))
    assert await read(silent.get_stats_async(timeout=0.05)) == []
    stats = await read(llm.get_stats_async(timeout=1.0))
    assert all(list(each) == contract["top"] for each in stats)
    caches = [each["kvCacheStats"] for each in stats]
    assert None in caches, "nested objects may be null"
    cache = next(each for each in caches if each is not None)
    assert list(cache) == contract["kvCacheStats"]
    assert (cache["maxNumBlocks"], cache["tokensPerBlock"]) == (256, 8)
    # The prompt has four blocks, the answer two; the last report may be one of those without.
    assert 4 <= max(each["usedNumBlocks"] for each in caches if each) <= 6
