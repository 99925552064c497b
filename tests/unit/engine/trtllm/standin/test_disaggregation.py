"""The stand-in hands KV over, and sets the traps of the library."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from unit.engine.trtllm.standin import standin_rig as rig


async def test_nothing_is_handed_over_without_a_transceiver(library: Any) -> None:
    llm = library.llm()
    with pytest.raises(library.errors.RequestError, match="cache_transceiver_config is not set"):
        await llm.generate_async(
            inputs=rig.PROMPT,
            sampling_params=library.sampling(),
            disaggregated_params=library.context(),
        )


async def prefilled(library: Any, llm: Any, prompt: list[int] = rig.PROMPT, **sampling: Any) -> Any:
    result = await llm.generate_async(
        inputs=prompt,
        sampling_params=library.sampling(**sampling),
        disaggregated_params=library.context(),
    )
    return result.outputs[0]


async def test_context_makes_one_token_and_holds_its_blocks(library: Any, expected: Any) -> None:
    context, generation = library.pair()
    reasons = []
    for _ in range(2):
        output = await prefilled(library, context, max_tokens=12)
        assert output.token_ids == expected[:1]
        reasons.append(output.finish_reason)
        assert context._executor.load().active_blocks == 5
        params = dataclasses.replace(output.disaggregated_params, request_type="generation_only")
        seen = await rig.steps(
            generation.generate_async(
                inputs=rig.PROMPT,
                sampling_params=library.sampling(12),
                streaming=True,
                disaggregated_params=params,
            )
        )
        # The first response repeats the context's token, and the difference leaves it out.
        assert seen[0][:2] == (expected[:2], expected[1:2])
        assert seen[-1][0] == expected
        await rig.idle(context)
    assert set(reasons) == {"length", "not_finished"}
    await rig.idle(generation)


async def test_context_ends_by_time_and_by_no_abort(library: Any) -> None:
    context, generation = library.pair(timeout_ms=400)
    result = context.generate_async(
        inputs=rig.PROMPT,
        sampling_params=library.sampling(),
        disaggregated_params=library.context(),
    )
    params = (await result).outputs[0].disaggregated_params
    result.abort()  # finished: without effect
    await asyncio.sleep(0.05)
    assert context._executor.load().active_blocks == 5
    # Aborted before its first output, a generation never fetches.
    params = dataclasses.replace(params, request_type="generation_only")
    aborted = generation.generate_async(
        inputs=rig.PROMPT, sampling_params=library.sampling(), disaggregated_params=params
    )
    aborted.abort()
    await aborted
    assert aborted.outputs[0].finish_reason == "cancelled"
    assert context._executor.load().active_blocks == 5
    await rig.idle(context)
    with pytest.raises(library.errors.RequestError):
        await generation.generate_async(
            inputs=rig.PROMPT, sampling_params=library.sampling(), disaggregated_params=params
        )
    await rig.idle(generation)


async def test_context_that_ends_on_its_end_id_holds_nothing(library: Any, expected: Any) -> None:
    context, _ = library.pair()
    output = await prefilled(library, context, end_id=expected[0])
    assert (output.token_ids, output.finish_reason) == (expected[:1], "stop")
    assert output.disaggregated_params.opaque_state is None
    await rig.idle(context)


async def test_generation_refuses_another_prompt_and_other_bytes(library: Any) -> None:
    context, generation = library.pair()
    params = (await prefilled(library, context)).disaggregated_params
    params = dataclasses.replace(params, request_type="generation_only")
    wrong = dataclasses.replace(params, opaque_state=b"made up")
    for prompt, given in ((rig.PROMPT[:-1], params), (rig.PROMPT, wrong)):
        with pytest.raises(library.errors.RequestError):
            await generation.generate_async(
                inputs=prompt, sampling_params=library.sampling(), disaggregated_params=given
            )
    state = bytearray(params.opaque_state)
    nonce = state.index(b"nonce") + 8
    state[nonce : nonce + 4] = b"0000" if state[nonce : nonce + 4] != b"0000" else b"1111"
    forged = dataclasses.replace(params, opaque_state=bytes(state))
    with pytest.raises(library.errors.RequestError, match="nonce"):
        await generation.generate_async(
            inputs=rig.PROMPT, sampling_params=library.sampling(), disaggregated_params=forged
        )
    assert context._executor.load().active_blocks == 5


async def test_generation_reports_the_time_of_its_fetch(library: Any) -> None:
    context, generation = library.pair(return_perf_metrics=True)
    params = (await prefilled(library, context)).disaggregated_params
    result = await generation.generate_async(
        inputs=rig.PROMPT,
        sampling_params=library.sampling(3),
        disaggregated_params=dataclasses.replace(params, request_type="generation_only"),
    )
    metrics = result.outputs[0].request_perf_metrics
    timing = metrics.timing_metrics
    assert timing.kv_cache_size == 5 * 8 * 2 * 2 * 2 * 16 * 4  # blocks, tokens, K/V, ..., float32
    assert (timing.kv_cache_transfer_end - timing.kv_cache_transfer_start).total_seconds() > 0
    assert metrics.kv_cache_metrics.num_total_allocated_blocks == 5


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["UCX", "NIXL"])
async def test_two_processes_exchange_kv(
    tmp_path: Path, model: Path, expected: list[int], backend: str
) -> None:
    with rig.installed(tmp_path, "1.2.1") as root:
        library = rig.Library(root, model)
        program = Path(rig.__file__).parents[4] / "standin" / "context_process.py"
        context = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(program), str(model), backend),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=rig.environment(root),
        )
        assert context.stdin
        assert context.stdout

        async def ask(prompt: list[int]) -> dict[str, Any]:
            assert context.stdin
            assert context.stdout
            context.stdin.write(json.dumps(prompt).encode() + b"\n")
            return dict(json.loads(await context.stdout.readline()))

        try:
            async with asyncio.timeout(60):
                while await context.stdout.readline() != b"ready\n":
                    pass
                body = await ask(rig.PROMPT)
                assert body.pop("active_blocks") == 5
                body["opaque_state"] = base64.b64decode(body["opaque_state"])
                transceiver = library.api.CacheTransceiverConfig(backend=backend)
                generation = library.llm(cache_transceiver_config=transceiver)
                params = library.api.DisaggregatedParams(
                    **body | {"request_type": "generation_only"}
                )
                result = await generation.generate_async(
                    inputs=rig.PROMPT,
                    sampling_params=library.sampling(12),
                    disaggregated_params=params,
                )
                assert result.outputs[0].token_ids == expected
                while (await ask([]))["active_blocks"]:
                    pass  # the answer takes its time
        finally:
            context.stdin.close()
            await context.wait()
            library.shut_down()
