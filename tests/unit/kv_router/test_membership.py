"""Instances come, go and restart; their KV events keep the index true."""

from contextlib import ExitStack

import msgspec
import pytest
from serving.config import RouterConfig
from serving.errors import InstanceRefused, NoInstances
from serving.kv_router.router import KvRouter
from serving.protocol import BlocksStored, KvEventBatch
from unit.kv_router.router_rig import (
    CARD,
    Clock,
    chosen,
    info,
    load_report,
    make_router,
    prompt,
    store,
)


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
def test_required_terms_can_be_given_before_any_instance_registers(expected, reason) -> None:
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
    router.failed("w0", epoch=1)
    router.failed("stranger", epoch=1)
    assert chosen(router, prompt(160)) == "w1"
    assert chosen(router, prompt(160), exclude=frozenset({"w1"})) == "w0"
    assert [one.breaker for one in router.state()] == ["open", "closed"]
    clock.now_s += 5
    assert [one.breaker for one in router.state()] == ["half_open", "closed"]
    with router.route(prompt(160), "agg", request_id="tries") as tries:
        assert tries.instance_id == "w0"
        assert chosen(router, prompt(160)) == "w1", "one at a time"
        tries.first_output()
        assert chosen(router, prompt(160)) == "w0"


def test_a_restarted_instance_starts_with_a_closed_breaker() -> None:
    router = make_router(info("w0"), info("w1"))
    router.add_instance(info("w0", epoch=2))
    router.failed("w0", epoch=1)
    assert [one.breaker for one in router.state()] == ["closed", "closed"]


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
