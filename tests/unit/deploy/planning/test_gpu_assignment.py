"""Several GPUs for one worker: disjoint, joined by NVLink where they can be, and never moved."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from serving.config import parse
from serving.config.process import WorkerSettings
from serving.config.resolve import with_topology
from serving.deploy.planning.gpu_assignment import (
    assign_gpus,
    existing_gpus,
    gpus_of_worker,
    require_enough_gpus,
    usable_gpus,
    visible_order,
)
from serving.deploy.planning.nvlink import all_joined
from serving.deploy.planning.plan import plan_deployment
from serving.deploy.planning.program import DeploymentPlan
from serving.errors import ConfigError
from serving.gpus import Links
from unit.deploy.planning.nvlink_machines import HGX_8X, PAIRS_2X2, PCIE_4X
from unit.deploy.resolved import CODE, resolve_for_test

HGX = list(range(8))


def config(**workers: Any) -> Any:
    raw = {"engine": {"backend": "tensorrt_llm", "device": "cuda"}, "workers": workers}
    return with_topology(parse(raw), "disagg")


def places(gpus: list[int], known: Links = frozenset(), **workers: Any) -> dict[str, list[int]]:
    found = assign_gpus(config(**workers), gpus, known)
    return {f"{role}-{index}": own for (role, index), own in found.items()}


def test_roles_of_different_sizes_take_gpus_from_both_ends() -> None:
    assert places(HGX, prefill=2, tensor_parallel={"prefill": 2, "decode": 4}) == {
        "prefill-0": [0, 1],
        "prefill-1": [2, 3],
        "decode-0": [4, 5, 6, 7],
    }


def test_pipeline_multiplies_tensor_parallel() -> None:
    sizes = {"tensor_parallel": {"prefill": 2}, "pipeline_parallel": {"prefill": 2, "decode": 2}}
    assert places(HGX, **sizes) == {"prefill-0": [0, 1, 2, 3], "decode-0": [6, 7]}


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("links", [HGX_8X, PCIE_4X, PAIRS_2X2], ids=["hgx", "pcie", "pairs"])
def test_one_more_worker_moves_no_other(role: str, links: Links) -> None:
    gpus = HGX if links == HGX_8X else [0, 1, 2, 3]
    for sizes in ({"prefill": 1, "decode": 1}, {"prefill": 2, "decode": 1}):
        size = {"prefill": 1, "decode": 1, **sizes}
        before = places(gpus, links, tensor_parallel=sizes)
        if 2 * size[role] + sum(size.values()) - size[role] > len(gpus):
            continue
        after = places(gpus, links, tensor_parallel=sizes, **{role: 2})
        assert after.items() >= before.items()


def test_workers_share_no_gpu_while_there_are_enough() -> None:
    for prefill in (1, 2, 4):
        for decode in (1, 2, 4):
            if prefill + decode > 8:
                continue
            found = places(HGX, tensor_parallel={"prefill": prefill, "decode": decode})
            used = [gpu for own in found.values() for gpu in own]
            assert len(used) == len(set(used)) == prefill + decode


def test_a_worker_gets_gpus_that_nvlink_joins() -> None:
    known = PAIRS_2X2
    found = places([0, 1, 2, 3], known, tensor_parallel={"prefill": 2, "decode": 2})
    assert found == {"prefill-0": [0, 2], "decode-0": [1, 3]}
    assert places([0, 1, 2, 3], tensor_parallel={"prefill": 2, "decode": 2}) == {
        "prefill-0": [0, 1],
        "decode-0": [2, 3],
    }


def test_a_pair_is_not_split_for_a_worker_of_one_gpu() -> None:
    known = frozenset({frozenset({0, 1})})
    found = places([0, 1, 2], known, tensor_parallel={"decode": 2})
    assert all_joined(found["decode-0"], known)
    assert found["prefill-0"] == [2]


def test_too_large_a_worker_names_the_key_and_the_bound() -> None:
    with pytest.raises(ConfigError) as caught:
        places([0, 1], tensor_parallel={"decode": 4})
    assert caught.value.key == "workers.tensor_parallel"
    assert "each decode worker needs 4 GPUs" in caught.value.what
    assert "at most 2" in caught.value.remedy


def test_too_many_workers_are_refused_with_the_number_each_needs() -> None:
    with pytest.raises(ConfigError) as caught:
        places([0, 1], tensor_parallel={"decode": 2})
    assert caught.value.key == "workers.gpus"
    assert "need 3 GPUs (1 prefill of 1, 1 decode of 2)" in caught.value.what


def test_workers_of_tensorrt_llm_share_only_with_bounded_pools() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_tokens"):
        places([0])
    raw = {"engine": {"backend": "tensorrt_llm", "device": "cuda", "kv_cache_tokens": 4096}}
    shared = assign_gpus(with_topology(parse(raw), "disagg"), [0])
    assert list(shared.values()) == [[0], [0]]
    torch = with_topology(parse({"workers": {"prefill": 3}}), "disagg")
    assert len(assign_gpus(torch, [0, 1])) == 4


def test_workers_of_one_gpu_take_gpus_from_both_ends() -> None:
    assert [gpus_of_worker("agg", i, [4, 5]) for i in range(4)] == [[4], [5], [4], [5]]
    assert [gpus_of_worker("decode", i, [4, 5]) for i in range(3)] == [[5], [4], [5]]
    require_enough_gpus({"agg": 9}, {"agg": 1}, [0], may_share=True)


def test_missing_gpu_is_explained_for_tensorrt_llm() -> None:
    with pytest.raises(ConfigError, match="TensorRT-LLM runs on NVIDIA GPUs") as caught:
        usable_gpus(None, [], "tensorrt_llm")
    assert "engine.backend: torch" in caught.value.remedy


def test_a_worker_sees_its_own_gpus_first_and_its_peers_after_them() -> None:
    assert visible_order([2, 0], [0, 1, 2, 3]) == "2,0,1,3"


def planned(
    container: dict[str, Any] | None = None, gpus: tuple[int, ...] = (0, 1)
) -> DeploymentPlan:
    raw: dict[str, Any] = {"engine": {"backend": "tensorrt_llm", "device": "cuda"}}
    if container is not None:
        raw["container"] = container
    device = "cuda" if gpus else "cpu"
    config = resolve_for_test(parse(raw), "disagg", device=device, dtype="bfloat16")
    return plan_deployment(config, gpus=gpus, code=CODE)


def test_settings_name_the_gpus_of_each_worker() -> None:
    def gpus_of_workers(plan: DeploymentPlan) -> list[list[int]]:
        settings = [plan[name].settings for name in plan.workers]
        return [msgspec.json.decode(text, type=WorkerSettings).gpus for text in settings]

    assert gpus_of_workers(planned()) == [[0], [1]]
    assert gpus_of_workers(planned(gpus=())) == [[], []]


def test_another_image_restarts_the_workers_alone() -> None:
    before = planned({"runtime": "podman", "image": "a:1"}).fingerprints
    after = planned({"runtime": "podman", "image": "a:2"}).fingerprints
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"worker-prefill-0", "worker-decode-0"}
    ignored = planned({"runtime": "none", "image": "a:1"}).fingerprints
    assert ignored == planned().fingerprints


def test_more_gpus_than_exist_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"`workers.gpus`: GPU 2, 3 does not exist \(there: 0, 1"):
        usable_gpus([1, 2, 3], [0, 1])
    with pytest.raises(ConfigError, match=r"`engine\.device`"):
        usable_gpus(None, [])
    assert usable_gpus([1, 0, 1], [0, 1]) == [1, 0]


def test_cuda_visible_devices_limits_the_existing_gpus(tmp_path: Any) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert existing_gpus({}, tmp_path) == [0, 1, 10]
    assert existing_gpus({"CUDA_VISIBLE_DEVICES": "1,7"}, tmp_path) == [1]
    assert existing_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        existing_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8f3e"}, tmp_path)
