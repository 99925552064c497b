"""The router keeps its picture of the instances true and spreads requests over them."""

import math
from collections import Counter
from contextlib import ExitStack
from random import Random

import msgspec
import pytest
from serving.config import RouterConfig
from serving.errors import InstanceRefused, NoInstances
from serving.kv_router.router import KvRouter
from serving.protocol import (
    BlocksStored,
    InstanceInfo,
    KvEventBatch,
    LoadReport,
    ModelCard,
)

BLOCK_SIZE = 16
CARD = ModelCard("m", "/tokenizer", 4096, BLOCK_SIZE, "salt", "fp", 0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def info(instance_id: str, role="agg", epoch: int = 1, card: ModelCard = CARD) -> InstanceInfo:
    return InstanceInfo(instance_id, epoch, role, [], "", card, 1000, 16, 1, "localhost")


def load_report(instance_id: str, queued_tokens: int = 0, active_blocks: int = 0, epoch: int = 1):
    return LoadReport(instance_id, epoch, 1, 0, queued_tokens, active_blocks, 0, 1000)


def make_router(*instances: InstanceInfo, policy="kv", seed=0, clock=None, **options) -> KvRouter:
    config = RouterConfig(policy=policy, **options)
    router = KvRouter(config, rng=Random(seed), clock=clock or Clock())
    for one in instances:
        router.add_instance(one)
    return router


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(50_000) for _ in range(num_tokens)]


def store(router: KvRouter, instance_id: str, token_ids: list[int], seq=1, epoch=1) -> bool:
    hashes = router.hash(token_ids).block_hashes
    return router.on_kv(KvEventBatch(instance_id, epoch, seq, [BlocksStored(None, hashes)]))


def chosen(router: KvRouter, token_ids: list[int], role="agg", **options) -> str:
    with router.route(token_ids, role, request_id="r", **options) as route:
        return route.instance_id


# --- membership ---------------------------------------------------------------------------------


def test_only_instances_of_the_role_are_chosen() -> None:
    router = make_router(info("p0", "prefill"), info("d0", "decode"))
    assert chosen(router, prompt(40), "prefill") == "p0"
    assert chosen(router, prompt(40), "decode") == "d0"
    assert [one.instance_id for one in router.instances("decode")] == ["d0"]
    assert router.instances("decode", exclude={"d0"}) == []
    with pytest.raises(NoInstances, match="role agg"):
        chosen(router, prompt(40), "agg")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 64}, "block size is 64, but 16"),
        ({"hash_salt": "other"}, "hash salt is 'other', but 'salt'"),
        ({"name": "other"}, "model is 'other', but 'm'"),
    ],
)
def test_an_instance_that_does_not_fit_is_refused_with_the_reason(change, reason) -> None:
    router = make_router(info("w0"))
    with pytest.raises(InstanceRefused, match=reason):
        router.add_instance(info("w1", card=msgspec.structs.replace(CARD, **change)))
    assert reason in router.refused["w1"]
    assert [one.instance_id for one in router.instances("agg")] == ["w0"]
    assert store(router, "w1", prompt(64)) is False
    assert router.counters.unregistered == 1


def test_a_refused_instance_that_comes_back_right_is_accepted() -> None:
    router = make_router(info("w9"))
    wrong = msgspec.structs.replace(CARD, block_size=64)
    with pytest.raises(InstanceRefused):
        router.add_instance(info("w0", card=wrong))
    router.add_instance(info("w0", epoch=2))
    assert router.refused == {}
    with pytest.raises(InstanceRefused):
        router.add_instance(info("w0", epoch=3, card=wrong))
    assert [one.instance_id for one in router.instances("agg")] == ["w9"]
    router.remove_instance("w0", 3)
    assert router.refused == {}


@pytest.mark.parametrize(
    ("expected", "reason"),
    [({"model": "x"}, "model"), ({"block_size": 8}, "block size"), ({"hash_salt": "x"}, "salt")],
)
def test_what_to_expect_can_be_given_before_any_instance_is_there(expected, reason) -> None:
    with pytest.raises(InstanceRefused, match=reason):
        KvRouter(RouterConfig(), **expected).add_instance(info("w0"))


def test_when_all_instances_are_gone_the_next_one_decides_what_fits() -> None:
    router = make_router(info("w0"))
    rebuilt = msgspec.structs.replace(CARD, block_size=32, hash_salt="new")
    with pytest.raises(InstanceRefused):
        router.add_instance(info("w1", card=rebuilt))
    router.remove_instance("w0", 1)
    router.add_instance(info("w1", card=rebuilt))
    store(router, "w1", prompt(64))
    with router.route(prompt(64), "agg", request_id="r") as route:
        assert (route.prompt_blocks, route.overlap_blocks, route.overlap_tokens) == (2, 2, 64)


def test_without_instances_a_prompt_can_be_hashed_but_not_routed() -> None:
    router = make_router()
    assert router.hash(prompt(64)) == (64, [])
    with pytest.raises(NoInstances):
        router.route(prompt(64), "agg", request_id="r")


def test_a_removed_instance_is_out_at_once_with_all_it_held() -> None:
    router = make_router(info("w0"), info("w1"))
    store(router, "w0", prompt(160))
    router.remove_instance("w0", 1)
    assert router.indexed_blocks == 0
    assert {chosen(router, prompt(160)) for _ in range(20)} == {"w1"}


def test_a_new_epoch_starts_empty_and_fences_the_old_one() -> None:
    router = make_router(info("w0"), info("w1"))
    store(router, "w0", prompt(160))
    router.on_load(load_report("w0", active_blocks=500))
    router.add_instance(info("w0", epoch=2))
    assert router.indexed_blocks == 0
    assert router.state()[-1].load.active_blocks == 0

    assert store(router, "w0", prompt(160), seq=2) is False
    router.on_load(load_report("w0", active_blocks=500))
    router.on_snapshot("w0", 1, 9, [1, 2, 3])
    router.remove_instance("w0", 1)
    router.add_instance(info("w0", epoch=1))
    assert router.counters.stale_epoch == 5
    assert router.indexed_blocks == 0
    assert [one.epoch for one in router.instances("agg") if one.instance_id == "w0"] == [2]


def test_seeing_the_same_registration_again_keeps_the_index() -> None:
    router = make_router(info("w0"))
    store(router, "w0", prompt(160))
    router.add_instance(info("w0"))
    assert router.indexed_blocks == 10


def test_releasing_a_route_of_a_replaced_registration_leaves_its_successor_alone() -> None:
    router = make_router(info("w0"))
    with router.route(prompt(160), "agg", request_id="old"):
        router.add_instance(info("w0", epoch=2))
        held = ExitStack()
        held.enter_context(router.route(prompt(160), "agg", request_id="new"))
    assert router.state()[0].load.num_requests == 1
    held.close()
    assert router.state()[0].load.num_requests == 0


def test_unavailable_instances_are_avoided_until_their_time_or_need_comes() -> None:
    clock = Clock()
    router = make_router(info("w0"), info("w1"), clock=clock)
    store(router, "w0", prompt(160))
    router.mark_unavailable("w0", clock.now_s + 5)
    router.mark_unavailable("stranger", math.inf)
    assert chosen(router, prompt(160)) == "w1"
    assert chosen(router, prompt(160), exclude=frozenset({"w1"})) == "w0"
    assert [one.available for one in router.state()] == [False, True]
    clock.now_s += 5
    assert chosen(router, prompt(160)) == "w0"


def test_excluded_instances_are_never_chosen() -> None:
    router = make_router(info("w0"), info("w1"))
    assert chosen(router, prompt(40), exclude=frozenset({"w0"})) == "w1"
    with pytest.raises(NoInstances, match="besides w0, w1"):
        chosen(router, prompt(40), exclude=frozenset({"w0", "w1"}))


# --- KV events ----------------------------------------------------------------------------------


def test_a_new_instance_needs_a_snapshot_until_its_first_batch_or_a_snapshot() -> None:
    router = make_router(info("w0"), info("w1"))
    assert router.needs_snapshot() == ["w0", "w1"]
    assert store(router, "w0", prompt(64)) is False
    assert router.on_snapshot("w1", 1, 7, [5, 6]) is False
    assert router.needs_snapshot() == []
    assert store(router, "w1", prompt(64), seq=9) is True
    assert router.needs_snapshot() == ["w1"]
    assert router.counters.gaps == 1


def test_after_a_reconnect_every_instance_needs_a_snapshot_but_the_index_stays() -> None:
    router = make_router(info("w0"), info("w1"))
    store(router, "w0", prompt(160))
    store(router, "w1", prompt(160, seed=1))
    router.distrust_index()
    assert router.needs_snapshot() == ["w0", "w1"]
    assert chosen(router, prompt(160)) == "w0"


@pytest.mark.parametrize("policy", ["round_robin", "random", "least_loaded"])
def test_policies_that_ignore_the_cache_pay_nothing_for_it(policy) -> None:
    router = make_router(info("w0"), policy=policy)
    assert router.hash(prompt(160)) == (160, [])
    batch = KvEventBatch("w0", 1, 5, [BlocksStored(None, [1, 2])])
    assert router.on_kv(batch) is False
    assert router.on_snapshot("w0", 1, 5, [1, 2]) is False
    assert router.needs_snapshot() == []
    assert router.indexed_blocks == 0
    assert chosen(router, prompt(160)) == "w0"


# --- requests -----------------------------------------------------------------------------------


def test_a_route_says_what_was_found_and_hashes_serve_twice() -> None:
    router = make_router(info("p0", "prefill"), info("d0", "decode"))
    store(router, "p0", prompt(100)[:64])
    hashes = router.hash(prompt(100))
    with (
        router.route(hashes, "prefill", request_id="r1") as prefill,
        router.route(hashes, "decode", request_id="r1") as decode,
    ):
        assert (prefill.overlap_blocks, prefill.overlap_tokens, prefill.prompt_blocks) == (4, 64, 7)
        assert (decode.overlap_blocks, decode.request_id, decode.role) == (0, "r1", "decode")
        by_id = {one.info.instance_id: one.load for one in router.state()}
        assert by_id["p0"] == (36, 3, 1)
        assert by_id["d0"] == (0, 7, 1)


def test_load_follows_a_request_from_routing_to_its_end() -> None:
    router = make_router(info("w0"))
    with router.route(prompt(100), "agg", request_id="r1") as route:
        assert router.state()[0].load == (100, 7, 1)
        route.first_output()
        assert router.state()[0].load == (0, 7, 1)
        route.generated(12)
        assert router.state()[0].load == (0, 7, 1)
        route.generated(1)
        assert router.state()[0].load == (0, 8, 1)
        route.generated(15 + 32)
        assert router.state()[0].load == (0, 10, 1)
    assert router.state()[0].load == (0, 0, 0)


def test_a_failed_request_releases_its_load() -> None:
    router = make_router(info("w0"))
    with pytest.raises(RuntimeError), router.route(prompt(100), "agg", request_id="r1"):
        raise RuntimeError
    assert router.state()[0].load == (0, 0, 0)


def test_reports_of_strangers_are_counted_and_ignored() -> None:
    router = make_router(info("w0"))
    router.on_load(load_report("w0", active_blocks=9, epoch=2))
    router.on_load(load_report("w7", active_blocks=9))
    assert router.counters.unregistered == 2
    assert router.state()[0].last_report is None


@pytest.mark.parametrize("role", ["prefill", "decode", "agg"])
@pytest.mark.parametrize("policy", ["kv", "least_loaded", "round_robin"])
def test_a_burst_of_distinct_prompts_spreads_evenly(policy, role) -> None:
    router = make_router(*(info(f"w{i}", role) for i in range(8)), policy=policy)
    with ExitStack() as running:
        counts = Counter(
            running.enter_context(
                router.route(prompt(500, seed=n), role, request_id=f"r{n}")
            ).instance_id
            for n in range(64)
        )
    assert set(counts.values()) == {8}


def test_a_burst_with_one_cached_prefix_overflows_to_other_instances() -> None:
    router = make_router(*(info(f"w{i}", "prefill") for i in range(4)))
    shared = prompt(1600)
    store(router, "w0", shared)
    with ExitStack() as running:
        counts = Counter(
            running.enter_context(
                router.route(shared + prompt(160, seed=n), "prefill", request_id=f"r{n}")
            ).instance_id
            for n in range(40)
        )
        queued_tokens = [one.load.queued_tokens for one in router.state()]
    assert counts["w0"] >= 11  # The prefix is worth ten tails: so many are cheaper behind it.
    assert min(counts[f"w{i}"] for i in range(1, 4)) >= 2
    assert max(queued_tokens) - min(queued_tokens) <= 1600 + 160


def test_a_short_burst_with_a_cached_prefix_stays_where_the_prefix_is() -> None:
    router = make_router(*(info(f"w{i}", "prefill") for i in range(4)))
    shared = prompt(1600)
    store(router, "w0", shared)
    with ExitStack() as running:
        routes = [
            running.enter_context(
                router.route(shared + prompt(160, seed=n), "prefill", request_id=f"r{n}")
            )
            for n in range(8)
        ]
    assert {route.instance_id for route in routes} == {"w0"}


def test_reported_work_of_other_frontends_repels_requests() -> None:
    router = make_router(info("w0"), info("w1"))
    store(router, "w0", prompt(160))
    router.on_load(load_report("w0", queued_tokens=5000))
    assert chosen(router, prompt(160)) == "w1"


def test_a_frozen_report_stops_repelling_when_it_is_old() -> None:
    clock = Clock()
    router = make_router(info("w0"), info("w1"), clock=clock)
    store(router, "w0", prompt(160))
    router.on_load(load_report("w0", queued_tokens=5000))
    clock.now_s += 60
    assert chosen(router, prompt(160)) == "w0"


@pytest.mark.parametrize("policy", ["kv", "random", "least_loaded", "round_robin"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_seed_routes_the_same_way(policy, temperature) -> None:
    def run(seed: int) -> list[str]:
        router = make_router(
            *(info(f"w{i}") for i in range(5)), policy=policy, seed=seed, temperature=temperature
        )
        return [chosen(router, prompt(200, seed=n)) for n in range(40)]

    assert run(7) == run(7)
    assert (run(7) == run(8)) is (policy == "round_robin")
