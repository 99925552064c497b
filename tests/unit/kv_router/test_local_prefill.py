"""When a decode instance prefills the prompt itself."""

from serving.kv_router.router import KvRouter
from serving.load_report import LoadReport
from unit.kv_router.router_rig import info, load_report, make_router, prompt, store


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
