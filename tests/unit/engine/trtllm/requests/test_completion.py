"""Cumulative results become outputs that say each token once."""

from types import SimpleNamespace
from typing import Any

import pytest
from serving.engine.trtllm.requests.completion import UNLIKELY, CompletionReader
from serving.protocol import EngineOutput, EngineRequest, SamplingParams, TokenLogprob


def generation(
    told: tuple[int, ...] = (), num_before: int = 0, **sampling: Any
) -> CompletionReader:
    """`told` come after what the engine takes as prompt; `num_before` are in that prompt."""
    tokens = [50] * (4 + num_before) + list(told)
    request = EngineRequest("r", tokens, 4, SamplingParams(**{"max_tokens": 20} | sampling))
    return CompletionReader(request, 4 + num_before)


def result(tokens: list[int], reason: str | None = None, **more: Any) -> Any:
    return SimpleNamespace(
        **{"token_ids": tokens, "finish_reason": reason, "stop_reason": None, "logprobs": []} | more
    )


def told(output: EngineOutput | None) -> tuple[list[int], str | None, int | None]:
    assert output is not None
    return output.token_ids, output.finish_reason, output.stop_token_id


def test_each_token_is_returned_once() -> None:
    ours = generation()
    tokens = [1]
    assert told(ours.advance(result(tokens))) == ([1], None, None)
    tokens += [2, 3]  # the library's list grows in place
    assert told(ours.advance(result(tokens))) == ([2, 3], None, None)
    assert ours.advance(result(tokens)) is None
    assert told(ours.advance(result(tokens, "length"))) == ([], "length", None)
    assert ours.finished


def test_a_decode_does_not_repeat_the_token_of_its_prefill() -> None:
    ours = generation(told=(1,))
    assert ours.advance(result([1])) is None
    assert told(ours.advance(result([1, 2]))) == ([2], None, None)


def test_end_id_is_kept_by_the_library_and_dropped_here() -> None:
    ours = generation(stop_token_ids=(7,))
    assert told(ours.advance(result([1, 7], "stop"))) == ([1], "stop", 7)


def test_stop_id_is_dropped_by_the_library_and_named() -> None:
    ours = generation(stop_token_ids=(7, 8))
    assert told(ours.advance(result([1], "stop", stop_reason=8))) == ([1], "stop", 8)


def test_stop_token_that_also_reaches_max_tokens_is_a_stop() -> None:
    ours = generation(stop_token_ids=(7,))
    assert told(ours.advance(result([1, 7], "length"))) == ([1], "stop", 7)


def test_stop_token_that_the_library_ignores_ends_the_request() -> None:
    ours = generation(stop_token_ids=(7,), min_tokens=2)
    assert told(ours.advance(result([7]))) == ([7], None, None)  # too early to stop
    assert told(ours.advance(result([7, 1, 7, 9]))) == ([1], "stop", 7)
    assert ours.finished


def test_min_tokens_counts_what_was_generated_elsewhere() -> None:
    ours = generation(num_before=2, stop_token_ids=(7,), min_tokens=3)
    assert told(ours.advance(result([7, 7]))) == ([7], "stop", 7)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("length", "length"), ("not_finished", "length"), ("cancelled", "cancelled")],
)
def test_finish_reasons_are_translated(reason: str, expected: str) -> None:
    assert told(generation().advance(result([1], reason))) == ([1], expected, None)


@pytest.mark.parametrize("reason", ["timeout", "something_new"])
def test_other_reasons_are_errors_that_keep_the_tokens(reason: str) -> None:
    output = generation().advance(result([1], reason))
    assert output is not None
    assert output.error is not None
    assert (output.token_ids, output.finish_reason) == ([1], "error")
    assert output.error.kind == "EngineFailed"
    assert reason in output.error.message


def entry(**values: float) -> dict[int, Any]:
    return {int(name[1:]): SimpleNamespace(logprob=value) for name, value in values.items()}


def test_logprobs_are_best_first_and_no_more_than_asked_for() -> None:
    ours = generation(logprobs=1)
    rows = [entry(t1=-0.1, t5=-2.0), entry(t6=-0.2, t2=-3.0, t7=-1.0)]
    output = ours.advance(result([1, 2], logprobs=rows))
    assert output is not None
    assert output.logprobs == [
        TokenLogprob(1, -0.1, [(1, -0.1)]),
        TokenLogprob(2, -3.0, [(6, -0.2)]),
    ]


def test_logprobs_of_only_the_chosen_token() -> None:
    output = generation(logprobs=0).advance(result([1], logprobs=[entry(t1=-0.1, t5=-2.0)]))
    assert output is not None
    assert output.logprobs == [TokenLogprob(1, -0.1, [])]


def test_logprobs_may_be_bare_numbers() -> None:
    output = generation(logprobs=0).advance(result([1, 2], logprobs=[-0.1, -0.2]))
    assert output is not None
    assert output.logprobs == [TokenLogprob(1, -0.1, []), TokenLogprob(2, -0.2, [])]


def test_logprobs_of_a_decode_are_aligned_at_the_end() -> None:
    ours = generation(told=(1,), logprobs=0)
    output = ours.advance(result([1, 2], logprobs=[-0.2]))  # none for the fetched token
    assert output is not None
    assert output.logprobs == [TokenLogprob(2, -0.2, [])]


def test_logprob_that_is_missing_is_unlikely_rather_than_wrong() -> None:
    output = generation(logprobs=1).advance(result([1, 2], logprobs=[entry(t9=-0.5)]))
    assert output is not None
    assert output.logprobs == [
        TokenLogprob(1, UNLIKELY, []),
        TokenLogprob(2, UNLIKELY, [(9, -0.5)]),
    ]


def test_stop_token_has_no_logprob() -> None:
    ours = generation(logprobs=0, stop_token_ids=(7,))
    output = ours.advance(result([1, 7], "stop", logprobs=[-0.1, -0.2]))
    assert output is not None
    assert output.logprobs == [TokenLogprob(1, -0.1, [])]
