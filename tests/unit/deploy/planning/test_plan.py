"""Config to programs: what runs where, and what restarts when something changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from serving.config import Config, connect_address, parse
from serving.config.process import FrontendSettings, WorkerSettings
from serving.config.resolve import with_topology, worker_counts
from serving.deploy.planning.gpu_assignment import (
    gpus_of_worker,
    visible_order,
)
from serving.deploy.planning.plan import plan_deployment, worker_environment
from serving.deploy.planning.program import DeploymentPlan, stop_tiers
from serving.errors import ConfigError
from unit.deploy.resolved import CODE, resolve_for_test


def planned(
    *, fingerprint: str = "e" * 16, gpus: tuple[int, ...] = (), code: Any = None, **raw: Any
) -> DeploymentPlan:
    device = "cuda" if gpus else "cpu"
    config = resolve_for_test(parse(raw), device=device, engine_fingerprint=fingerprint)
    return plan_deployment(config, gpus=gpus, code=code or CODE)


def changed(before: DeploymentPlan, after: DeploymentPlan) -> set[str]:
    """Programs in both whose fingerprints differ."""
    old, new = before.fingerprints, after.fingerprints
    return {name for name in old.keys() & new.keys() if old[name] != new[name]}


def workers(plan: DeploymentPlan) -> dict[str, WorkerSettings]:
    return {
        name: msgspec.json.decode(plan[name].settings, type=WorkerSettings) for name in plan.workers
    }


def test_disagg_starts_etcd_and_nats_first_and_the_frontend_last() -> None:
    names = list(planned(workers={"decode": 2}).fingerprints)
    assert names[:2] == ["etcd", "nats"]
    assert names[2:-1] == ["worker-prefill-0", "worker-decode-0", "worker-decode-1"]
    assert names[-1] == "frontend"


def test_agg_has_only_agg_workers() -> None:
    made = planned(deployment={"topology": "agg"}, workers={"agg": 2})
    assert made.workers == ["worker-agg-0", "worker-agg-1"]
    frontend = msgspec.json.decode(made["frontend"].settings, type=FrontendSettings)
    assert not frontend.disaggregated


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("gpus", [(), (0,), (0, 1), (0, 1, 2, 3)])
def test_one_more_worker_changes_no_other_program(role: str, gpus: tuple[int, ...]) -> None:
    before = planned(gpus=gpus)
    after = planned(gpus=gpus, workers={role: 2})
    assert changed(before, after) == set()
    assert set(after.fingerprints) - set(before.fingerprints) == {f"worker-{role}-1"}


def test_router_change_restarts_the_frontend_alone() -> None:
    made = planned(router={"policy": "random"}, deployment={"topology": "disagg"})
    assert changed(planned(deployment={"topology": "disagg"}), made) == {"frontend"}


def test_new_engine_restarts_workers_and_frontend() -> None:
    roles = {"worker-prefill-0", "worker-decode-0"}
    assert changed(planned(), planned(fingerprint="f" * 16)) == {*roles, "frontend"}


def test_worker_limits_restart_only_workers() -> None:
    made = planned(engine={"max_batch_size": 4})
    assert changed(planned(), made) == {"worker-prefill-0", "worker-decode-0"}


def test_start_deadline_restarts_no_program() -> None:
    assert changed(planned(), planned(deployment={"start_s": 500})) == set()


def test_new_code_restarts_the_programs_that_use_it() -> None:
    newer = planned(code={"worker": "w", "frontend": "f2"})
    assert changed(planned(), newer) == {"frontend"}


def test_nats_port_restarts_every_program_that_connects_to_nats() -> None:
    assert changed(planned(), planned(nats={"port": 4333})) == {
        *("nats", "worker-prefill-0", "worker-decode-0", "frontend")
    }


def test_router_topologies_pin_kv_and_the_others_leave_the_policy() -> None:
    config = parse({"router": {"policy": "random"}})
    assert with_topology(config, "disagg_router").router.policy == "kv"
    assert with_topology(config, "disagg").router.policy == "random"
    assert with_topology(config, "agg").deployment.topology == "agg"


def test_plan_holds_no_secret_and_listens_on_loopback() -> None:
    made = planned()
    assert "@TOKEN@" in made["nats"].settings
    assert '"127.0.0.1:4222"' in made["nats"].settings
    assert "--listen-client-urls=http://127.0.0.1:2379" in made["etcd"].command


def test_wildcard_and_ipv6_addresses_can_be_connected_to() -> None:
    assert connect_address("0.0.0.0", 80) == "127.0.0.1:80"
    assert connect_address("::", 80) == "[::1]:80"
    assert connect_address("::1", 80) == "[::1]:80"
    made = planned(etcd={"host": "::1"})
    assert "--listen-client-urls=http://[::1]:2379" in made["etcd"].command


def test_unknown_program_names_the_topology() -> None:
    with pytest.raises(ConfigError, match="worker-decode-7 is no program of the topology disagg"):
        planned()["worker-decode-7"]


def test_frontend_stops_before_workers_and_workers_before_nats_and_etcd() -> None:
    names = ["etcd", "nats", "worker-decode-0", "worker-prefill-0", "frontend"]
    assert stop_tiers(names) == [
        *(["frontend"], ["worker-decode-0", "worker-prefill-0"], ["nats"], ["etcd"])
    ]


def test_roles_use_different_gpus_when_there_are_two() -> None:
    assert [w.gpus for w in workers(planned(gpus=(0, 1))).values()] == [[0], [1]]
    assert [w.gpus for w in workers(planned(gpus=(3,))).values()] == [[3], [3]]
    assert [gpus_of_worker("agg", i, [4, 5]) for i in range(4)] == [[4], [5], [4], [5]]
    assert all(w.gpus == [] for w in workers(planned()).values())


def test_a_worker_sees_its_own_gpu_first_and_its_peers_after_it() -> None:
    assert visible_order([1], [0, 1, 2]) == "1,0,2"
    [worker, _] = workers(planned(gpus=(0, 1))).values()
    environment = worker_environment(with_topology(Config(), "disagg"), worker, [0, 1], 8)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_workers_share_the_cores_unless_num_threads_is_set() -> None:
    config = with_topology(Config(), "disagg")
    [worker, _] = workers(planned()).values()
    assert worker_environment(config, worker, [], 8)["OMP_NUM_THREADS"] == "4"
    assert worker_environment(config, worker, [], 1)["OMP_NUM_THREADS"] == "1"
    chosen = with_topology(parse({"engine": {"num_threads": 3}}), "disagg")
    environment = worker_environment(chosen, worker, [], 8)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert worker_counts(parse({"workers": {"prefill": 2, "decode": 3}})) == {
        "prefill": 2,
        "decode": 3,
    }
