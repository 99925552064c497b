"""Policies, tested with two dictionaries: overlap and load."""

from collections import Counter
from random import Random

import pytest
from serving.config import RouterConfig
from serving.kv_router.load import Load
from serving.kv_router.policy import PromptSize, RoutingRequest, cheapest, sample, select

PROMPT = PromptSize(num_tokens=1024, block_size=16)
IDLE = {"a": Load(), "b": Load(), "c": Load()}


def pick(policy, role, overlap, load, *, seed=0, turn=0, content=None, **options):
    options = {"overlap_weight": 1.0, **options}
    block_hashes = [] if content is None else [content]
    request = RoutingRequest(role, PROMPT, overlap, load, turn, block_hashes)
    return select(request, config=RouterConfig(policy=policy, **options), rng=Random(seed))


@pytest.mark.parametrize("role", ["prefill", "decode", "agg"])
def test_kv_prefers_the_longest_overlap_among_equally_loaded(role) -> None:
    assert pick("kv", role, {"a": 3, "b": 40}, IDLE) == "b"


@pytest.mark.parametrize("role", ["prefill", "agg"])
def test_kv_leaves_a_cached_prefix_when_its_queue_costs_more_than_computing(role) -> None:
    overlap = {"b": 60}
    assert pick("kv", role, overlap, IDLE | {"b": Load(queued_tokens=900)}) == "b"
    assert pick("kv", role, overlap, IDLE | {"b": Load(queued_tokens=1000)}) != "b"


def test_kv_prefill_does_not_look_at_active_blocks() -> None:
    assert pick("kv", "prefill", {"b": 1}, IDLE | {"b": Load(active_blocks=9999)}) == "b"


def test_kv_decode_balances_active_blocks_against_missing_ones() -> None:
    overlap = {"b": 64}
    assert pick("kv", "decode", overlap, IDLE | {"b": Load(active_blocks=63)}) == "b"
    assert pick("kv", "decode", overlap, IDLE | {"b": Load(active_blocks=65)}) != "b"
    loaded = IDLE | {"b": Load(active_blocks=65)}
    assert pick("kv", "decode", overlap, loaded, overlap_weight=2.0) == "b"


def test_kv_decode_does_not_look_at_queued_tokens() -> None:
    assert pick("kv", "decode", {"b": 1}, IDLE | {"b": Load(queued_tokens=99_999)}) == "b"


def test_kv_agg_looks_at_held_blocks_but_minds_computing_more() -> None:
    held = {
        "a": Load(active_blocks=320),
        "b": Load(queued_tokens=100),
        "c": Load(queued_tokens=900),
    }
    assert pick("kv", "agg", {}, held) == "b"
    assert pick("kv", "agg", {}, held | {"b": Load(queued_tokens=200)}) == "a"


def test_overlap_weight_trades_cached_blocks_for_queue_length() -> None:
    overlap = {"b": 60}
    busy = IDLE | {"b": Load(queued_tokens=1500)}
    assert pick("kv", "prefill", overlap, busy, overlap_weight=1.0) != "b"
    assert pick("kv", "prefill", overlap, busy, overlap_weight=2.0) == "b"
    assert (
        pick("kv", "prefill", {"b": 64}, IDLE | {"b": Load(queued_tokens=1)}, overlap_weight=0)
        != "b"
    )


def test_blocks_on_the_host_are_worth_a_part() -> None:
    assert PROMPT.uncached_tokens(10.5) == 1024 - 168
    assert pick("kv", "prefill", {"a": 10.5, "b": 10.0}, IDLE) == "a"


@pytest.mark.parametrize("role", ["prefill", "decode", "agg"])
def test_least_loaded_ignores_the_cache(role) -> None:
    load = {"a": Load(active_blocks=5), "b": Load(queued_tokens=64), "c": Load(active_blocks=6)}
    assert pick("least_loaded", role, {"c": 64}, load) == "b"


def test_round_robin_takes_turns() -> None:
    turns = [pick("round_robin", "agg", {"a": 64}, IDLE, turn=turn) for turn in range(6)]
    assert turns == ["a", "b", "c"] * 2


@pytest.mark.parametrize("policy", ["kv", "random", "least_loaded"])
def test_equal_instances_share_the_requests(policy) -> None:
    rng = Random(1)
    config = RouterConfig(policy=policy)
    request = RoutingRequest("agg", PROMPT, {}, IDLE)
    counts = Counter(select(request, config=config, rng=rng) for _ in range(900))
    assert set(counts) == set(IDLE)
    assert min(counts.values()) > 240


def test_new_content_of_the_prompt_decides_between_equal_instances() -> None:
    """So do frontends that know nothing of each other, and one prefix meets itself."""
    picked = [pick("kv", "agg", {}, IDLE, seed=n, content=n // 2 * 977) for n in range(600)]
    assert picked[::2] == picked[1::2]
    assert min(Counter(picked).values()) > 130


@pytest.mark.parametrize("policy", ["kv", "random", "least_loaded", "round_robin"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_seed_decides_everything(policy, temperature) -> None:
    config = RouterConfig(policy=policy, temperature=temperature)

    def run(seed: int) -> list[str]:
        rng = Random(seed)
        choices = [RoutingRequest("agg", PROMPT, {"a": n % 3}, IDLE, n) for n in range(50)]
        return [select(request, config=config, rng=rng) for request in choices]

    assert run(4) == run(4)


def test_a_fully_cached_prompt_still_has_one_token_to_compute() -> None:
    assert PROMPT.uncached_tokens(64) == 1
    assert PROMPT.uncached_tokens(10) == 1024 - 160
    assert PromptSize(1025, 16).num_blocks == 65


def test_cheapest_breaks_ties_among_the_lowest_only() -> None:
    rng = Random(0)
    costs = [2.0, 1.0, 1.0, 3.0]
    assert {cheapest("abcd", costs, rng) for _ in range(50)} == {"b", "c"}
    assert {cheapest("abcd", costs, rng, content) for content in range(50)} == {"b", "c"}


def test_temperature_spreads_but_keeps_the_order_of_costs() -> None:
    rng = Random(2)
    counts = Counter(sample([0.0, 50.0, 100.0], 0.5, rng) for _ in range(3000))
    assert counts[0] > counts[1] > counts[2] > 0


def test_temperature_means_the_same_at_any_scale_of_costs() -> None:
    small = [sample([0.0, 1.0, 2.0], 0.7, Random(seed)) for seed in range(200)]
    large = [sample([0.0, 1e6, 2e6], 0.7, Random(seed)) for seed in range(200)]
    assert small == large


def test_a_tiny_temperature_is_the_cheapest_and_equal_costs_are_uniform() -> None:
    rng = Random(2)
    assert {sample([3.0, 1.0, 2.0], 1e-9, rng) for _ in range(50)} == {1}
    assert {sample([7.0, 7.0], 1e-9, rng) for _ in range(50)} == {0, 1}
