"""Routing decisions: load, cached prefixes, sessions and peer routers."""

from collections import Counter
from contextlib import ExitStack

import pytest
from serving.kv_router.peers import RoutingDecision
from serving.kv_router.router import KvRouter
from serving.protocol import BlocksStored, KvEventBatch
from unit.kv_router.router_rig import (
    Clock,
    chosen,
    info,
    load_report,
    make_router,
    prompt,
    store,
)


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
