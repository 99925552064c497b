"""The router keeps its picture of the instances true and spreads requests over them."""

from collections import Counter
from contextlib import ExitStack
from random import Random

import msgspec
import pytest
from serving.config import RouterConfig
from serving.errors import InstanceRefused, NoInstances
from serving.kv_router.peers import RoutingDecision
from serving.kv_router.router import KvRouter
from serving.load_report import LoadReport
from serving.protocol import BlocksStored, InstanceInfo, KvEventBatch, ModelCard

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


# --- requests -----------------------------------------------------------------------------------


def test_a_route_reports_its_overlap_and_hashes_can_be_routed_twice() -> None:
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
    assert max(queued_tokens) - min(queued_tokens) <= router.config.overlap_weight * 1600 + 160


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
    # Ties of `kv` are broken by what the prompt says.
    assert (run(7) == run(8)) is (policy == "round_robin" or (policy, temperature) == ("kv", 0.0))


# --- tiers, sessions, other frontends ---------------------------------------------------------------


def test_a_block_on_the_host_attracts_less_than_one_on_the_device() -> None:
    router = make_router(info("w0"), info("w1"), host_tier_weight=0.5)
    hashes = router.hash(prompt(160)).block_hashes
    router.on_kv(KvEventBatch("w0", 1, 1, [BlocksStored(None, hashes, "host")]))
    assert chosen(router, prompt(160)) == "w0"
    router.on_kv(KvEventBatch("w1", 1, 1, [BlocksStored(None, hashes[:6])]))
    assert chosen(router, prompt(160)) == "w1"
    with router.route(prompt(160), "agg", request_id="r", exclude={"w1"}) as route:
        assert route.overlap_blocks == 10
        assert router.state()[0].load.queued_tokens == 160 - 80


@pytest.mark.parametrize("policy", ["kv", "random", "round_robin", "least_loaded"])
def test_a_session_stays_where_it_was(policy) -> None:
    router = make_router(*(info(f"w{i}") for i in range(8)), policy=policy, session_affinity=0.5)
    homes: dict[str, set[str]] = {}
    for n in range(80):
        session = f"s{n % 10}"
        homes.setdefault(session, set()).add(chosen(router, prompt(320, seed=n), session=session))
    assert all(len(instances) == 1 for instances in homes.values())


def test_a_session_leaves_an_instance_that_is_busy_or_gone() -> None:
    router = make_router(info("w0"), info("w1"), session_affinity=0.5)
    home = chosen(router, prompt(320), session="s")
    other = "w1" if home == "w0" else "w0"
    router.on_load(load_report(home, queued_tokens=5000))
    assert chosen(router, prompt(320, seed=1), session="s") == other
    router.remove_instance(other, 1)
    assert chosen(router, prompt(320, seed=2), session="s") == home


def test_sessions_are_ignored_unless_configured() -> None:
    router = make_router(*(info(f"w{i}") for i in range(8)))
    assert len({chosen(router, prompt(320, seed=n), session="s") for n in range(60)}) > 4


class FakePeers:
    """Publishes by appending to what each peer has yet to read."""

    def __init__(self) -> None:
        self.peers: list[FakePeers] = []
        self.unread: list[RoutingDecision] = []

    def publish(self, decision: RoutingDecision) -> None:
        for other in self.peers:
            other.unread.append(decision)

    def updates(self) -> list[RoutingDecision]:
        heard, self.unread = self.unread, []
        return heard


def make_acquainted(*routers: KvRouter) -> None:
    everybody = [FakePeers() for _ in routers]
    for router, own in zip(routers, everybody, strict=True):
        router.peers = own
        own.peers = [other for other in everybody if other is not own]


def test_routers_that_share_decisions_do_not_send_a_burst_to_one_instance() -> None:
    routers = [make_router(*(info(f"w{i}") for i in range(4)), seed=n) for n in range(4)]
    make_acquainted(*routers)
    counts: Counter[str] = Counter()
    with ExitStack() as running:
        for number in range(32):
            router = routers[number % 4]
            route = router.route(prompt(500, seed=number), "agg", request_id=f"r{number}")
            running.enter_context(route)
            counts[route.instance_id] += 1
    assert set(counts.values()) == {8}


def test_a_peer_decision_counts_for_the_same_registration_only() -> None:
    router, elsewhere = make_router(info("w0", epoch=2)), make_router(info("w9"), info("w0"))
    same = make_router(info("w0", epoch=2))
    make_acquainted(router, elsewhere, same)
    for _ in range(4):
        elsewhere.route(prompt(500), "agg", request_id="r")
    assert router.state()[0].load == (0, 0, 0)
    same.route(prompt(500), "agg", request_id="r")
    assert router.state()[0].load == (500, 32, 1)
    same.route(prompt(500), "agg", request_id="r")
    router.remove_instance("w0", 2)
    assert router.state() == []


def test_a_peer_decision_older_than_the_last_report_is_not_added() -> None:
    clock = Clock()
    router, other = (make_router(info("w0"), clock=clock) for _ in range(2))
    make_acquainted(router, other)
    other.route(prompt(500), "agg", request_id="r")
    clock.now_s += 1.0
    router.on_load(load_report("w0", queued_tokens=70))
    assert router.state()[0].load.queued_tokens == 70


# --- prefill on the decode instance -----------------------------------------------------------------


def make_disaggregated(**options) -> KvRouter:
    return make_router(info("p0", "prefill"), info("d0", "decode"), info("d1", "decode"), **options)


def local(router: KvRouter, token_ids: list[int], **options) -> str | None:
    route = router.route_local(token_ids, request_id="r", **options)
    if route is None:
        return None
    with route:
        return route.instance_id


def test_prefill_and_decode_are_apart_by_default() -> None:
    assert local(make_disaggregated(), prompt(320)) is None


def test_short_or_mostly_cached_prompts_are_prefilled_on_the_decode_instance() -> None:
    router = make_disaggregated()
    store(router, "d1", prompt(320)[:304])
    busy = LoadReport("d1", 1, 5, 0, 0, 100, 0, 1000)
    router.on_load(busy)
    assert local(router, prompt(320)) == "d1"
    assert local(router, prompt(320), exclude={"d1"}) is None
    assert local(router, prompt(9)) in ("d0", "d1")
    store(router, "d1", prompt(320, seed=1)[:288], seq=2)
    assert local(router, prompt(320, seed=1)) is None
    roomy = make_disaggregated(local_prefill_tokens=32)
    store(roomy, "d1", prompt(320)[:288])
    roomy.on_load(busy)
    assert local(roomy, prompt(320)) == "d1"


def test_nothing_is_prefilled_where_requests_wait_already() -> None:
    router = make_disaggregated()
    for name in ("d0", "d1"):
        router.on_load(LoadReport(name, 1, 9, 1, 0, 990, 0, 1000))
    assert local(router, prompt(9)) is None
    router.on_load(LoadReport("d0", 1, 9, 0, 0, 990, 0, 1000))
    assert local(router, prompt(9)) == "d0"


def test_a_local_prefill_counts_as_queued_on_its_instance() -> None:
    router = make_disaggregated(local_prefill_tokens=64)
    store(router, "d1", prompt(320)[:288])
    route = router.route_local(prompt(320), request_id="r")
    assert route is not None
    with route:
        assert (route.role, route.instance_id, route.overlap_blocks) == ("decode", "d1", 18)
        state = {one.info.instance_id: one.load for one in router.state()}
        assert state["d1"] == (32, 2, 1)


def test_an_idle_decode_instance_helps_when_prefill_instances_are_behind() -> None:
    router = make_disaggregated(local_prefill_when_idle=True)
    assert local(router, prompt(320)) is None
    router.on_load(load_report("p0", queued_tokens=500))
    assert local(router, prompt(320)) in ("d0", "d1")
    for name in ("d0", "d1"):
        router.on_load(LoadReport(name, 1, 1, 0, 0, 20, 0, 1000))
    assert local(router, prompt(320)) is None
    reluctant = make_disaggregated()
    reluctant.on_load(load_report("p0", queued_tokens=500))
    assert local(reluctant, prompt(320)) is None


def test_local_prefill_is_not_considered_where_a_role_or_the_index_is_missing() -> None:
    assert local(make_router(info("d0", "decode")), prompt(9)) is None
    assert local(make_router(info("p0", "prefill")), prompt(9)) is None
    assert local(make_disaggregated(policy="round_robin"), prompt(9)) is None
