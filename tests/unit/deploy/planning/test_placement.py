"""Several GPUs for one worker: disjoint, joined by NVLink where they can be, and never moved."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from serving.config import parse
from serving.config.process import WorkerSettings
from serving.deploy.planning.nvlink import joined
from serving.deploy.planning.placement import place, require_room, usable_gpus, visible_order
from serving.deploy.planning.topology import DeploymentPlan, pinned, placed, plan
from serving.errors import ConfigError
from serving.gpus import Links
from unit.deploy.planning.nvlink_machines import HGX_8X, PAIRS_2X2, PCIE_4X

HGX = list(range(8))


def config(**workers: Any) -> Any:
    raw = {"engine": {"backend": "tensorrt_llm", "device": "cuda"}, "workers": workers}
    return pinned(parse(raw), "disagg")


def places(gpus: list[int], known: Links = frozenset(), **workers: Any) -> dict[str, list[int]]:
    found = placed(config(**workers), gpus, known)
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


def test_workers_never_share_while_there_are_enough() -> None:
    for prefill in (1, 2, 4):
        for decode in (1, 2, 4):
            if prefill + decode > 8:
                continue
            found = places(HGX, tensor_parallel={"prefill": prefill, "decode": decode})
            used = [gpu for own in found.values() for gpu in own]
            assert len(used) == len(set(used)) == prefill + decode


def test_neighbours_are_those_that_nvlink_joins() -> None:
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
    assert joined(found["decode-0"], known)
    assert found["prefill-0"] == [2]


def test_too_large_a_worker_names_the_key_and_the_bound() -> None:
    with pytest.raises(ConfigError) as caught:
        places([0, 1], tensor_parallel={"decode": 4})
    assert caught.value.key == "workers.tensor_parallel"
    assert "each decode worker needs 4 GPUs" in caught.value.what
    assert "at most 2" in caught.value.remedy


def test_too_many_workers_say_what_each_takes() -> None:
    with pytest.raises(ConfigError) as caught:
        places([0, 1], tensor_parallel={"decode": 2})
    assert caught.value.key == "workers.gpus"
    assert "need 3 GPUs (1 prefill of 1, 1 decode of 2)" in caught.value.what


def test_workers_of_tensorrt_llm_share_only_with_bounded_pools() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_tokens"):
        places([0])
    raw = {"engine": {"backend": "tensorrt_llm", "device": "cuda", "kv_cache_tokens": 4096}}
    shared = placed(pinned(parse(raw), "disagg"), [0])
    assert list(shared.values()) == [[0], [0]]
    torch = pinned(parse({"workers": {"prefill": 3}}), "disagg")
    assert len(placed(torch, [0, 1])) == 4


def test_single_gpus_are_handed_out_as_before() -> None:
    assert [place("agg", i, [4, 5]) for i in range(4)] == [[4], [5], [4], [5]]
    assert [place("decode", i, [4, 5]) for i in range(3)] == [[5], [4], [5]]
    require_room({"agg": 9}, {"agg": 1}, [0], may_share=True)


def test_no_gpu_is_explained_for_the_engine_that_needs_one() -> None:
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
    return plan(
        pinned(parse(raw), "disagg"),
        engine_fingerprint="e" * 16,
        device="cuda" if gpus else "cpu",
        dtype="bfloat16",
        gpus=list(gpus),
        code={"worker": "w", "frontend": "f"},
    )


def test_workers_are_told_their_gpus_and_none_without_any() -> None:
    def told(made: DeploymentPlan) -> list[list[int]]:
        read = [msgspec.json.decode(made[n].settings, type=WorkerSettings) for n in made.workers]
        return [process.gpus for process in read]

    assert told(planned()) == [[0], [1]]
    assert told(planned(gpus=())) == [[], []]


def test_another_image_restarts_the_workers_alone() -> None:
    before = planned({"runtime": "podman", "image": "a:1"}).fingerprints
    after = planned({"runtime": "podman", "image": "a:2"}).fingerprints
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"worker-prefill-0", "worker-decode-0"}
    ignored = planned({"runtime": "none", "image": "a:1"}).fingerprints
    assert ignored == planned().fingerprints
