"""The traps of `tensorrt_llm.SamplingParams`, one by one."""

from typing import Any

import pytest
from serving.engine.trtllm.requests.sampling import Vocabulary, num_to_generate, sampling_arguments
from serving.errors import InvalidRequest
from serving.protocol import EngineRequest, SamplingParams

VOCABULARY = Vocabulary(100, (2, 3), 0)


def make(num_before: int = 0, **sampling: Any) -> EngineRequest:
    """Four prompt tokens, and `num_before` that were generated before."""
    params = SamplingParams(**{"max_tokens": 10, "temperature": 0.0} | sampling)
    return EngineRequest("r", [5] * (4 + num_before), 4, params)


def arguments(
    request: EngineRequest, vocabulary: Vocabulary = VOCABULARY, max_tokens: int = 10
) -> dict[str, Any]:
    return sampling_arguments(
        request, num_prompt=len(request.token_ids), max_tokens=max_tokens, vocabulary=vocabulary
    )


def test_tokens_generated_before_count_against_max_tokens_and_the_context() -> None:
    assert num_to_generate(make(), 4, 64) == 10
    assert num_to_generate(make(num_before=3), 7, 64) == 7
    assert num_to_generate(make(num_before=3), 4, 64) == 10  # fetched: the engine says them again
    assert num_to_generate(make(), 4, 9) == 5
    with pytest.raises(InvalidRequest, match="leaves nothing"):
        num_to_generate(make(num_before=10), 14, 64)


def test_max_tokens_is_always_set() -> None:
    assert arguments(make(), max_tokens=7)["max_tokens"] == 7


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.0}],
)
def test_greedy_sampling_is_top_k_one_alone(sampling: dict[str, Any]) -> None:
    said = arguments(make(**sampling))
    assert said["top_k"] == 1
    assert not {"temperature", "top_p", "min_p"} & said.keys()


def test_sampling_always_sets_top_p_because_its_absence_means_greedy() -> None:
    said = arguments(make(temperature=0.7))
    assert (said["temperature"], said["top_p"]) == (0.7, 1.0)
    assert "top_k" not in said
    said = arguments(make(temperature=0.7, top_p=0.5, top_k=40, min_p=0.1))
    assert (said["top_p"], said["top_k"], said["min_p"]) == (0.5, 40, 0.1)


def test_unseeded_requests_differ_and_seeds_are_unsigned() -> None:
    assert arguments(make())["seed"] != arguments(make())["seed"]
    assert arguments(make(seed=7))["seed"] == 7
    assert arguments(make(seed=-1))["seed"] == 2**64 - 1


def test_one_stop_is_the_end_id_and_the_others_are_stop_token_ids() -> None:
    said = arguments(make(stop_token_ids=(2, 3, 9)))
    assert said["end_id"] == 2
    assert said["stop_token_ids"] == [3, 9]
    assert "ignore_eos" not in said
    assert "stop" not in said


def test_ignored_eos_is_no_stop_but_a_persons_stops_are() -> None:
    said = arguments(make())
    assert said["ignore_eos"] is True
    assert said["end_id"] == 2
    assert "stop_token_ids" not in said
    said = arguments(make(stop_token_ids=(9,)))
    assert said["ignore_eos"] is True
    assert said["stop_token_ids"] == [9]


def test_model_without_eos_still_gets_an_end_id() -> None:
    base = Vocabulary(100, (), None)
    said = arguments(make(), base)
    assert (said["end_id"], said["pad_id"], said["ignore_eos"]) == (-1, 0, True)
    said = arguments(make(stop_token_ids=(9, 8)), base)
    assert said["end_id"] == 9
    assert said["stop_token_ids"] == [8]


def test_pad_id_is_the_models_or_its_eos() -> None:
    assert arguments(make())["pad_id"] == 0
    assert arguments(make(), Vocabulary(100, (3,), None))["pad_id"] == 3


def test_min_tokens_counts_what_came_before_and_keeps_other_stops_out() -> None:
    said = arguments(make(num_before=2, min_tokens=5, stop_token_ids=(2, 9)))
    assert said["min_tokens"] == 3
    assert "stop_token_ids" not in said  # they would end it before
    said = arguments(make(num_before=5, min_tokens=5, stop_token_ids=(2, 9)))
    assert "min_tokens" not in said
    assert said["stop_token_ids"] == [9]


def test_logprobs_of_only_the_chosen_token_are_asked_for_as_one() -> None:
    assert "logprobs" not in arguments(make())
    assert arguments(make(logprobs=0))["logprobs"] == 1
    assert arguments(make(logprobs=5))["logprobs"] == 5


def test_only_effective_penalties_are_set() -> None:
    names = {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    assert not names & arguments(make()).keys()
    said = arguments(make(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-0.5))
    assert {name: said[name] for name in names} == {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
    }


def test_no_text_is_made() -> None:
    assert arguments(make())["detokenize"] is False
