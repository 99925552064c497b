"""GPUs that a worker sees, and an engine that was made for others."""

import pytest
from serving.engine.trtllm.visible_gpus import check_gpus, select_visible
from serving.errors import OperatorError
from serving.gpus import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", 90, index=0, uuid="GPU-aaaa-1")
INSTALLED = [
    H100,
    Gpu("NVIDIA H100 80GB HBM3", 90, index=1, uuid="GPU-bbbb-2"),
    Gpu("NVIDIA A100-SXM4-80GB", 80, index=2, uuid="GPU-cccc-3"),
]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-bbbb", [1]),
        ("1,7,0", [1]),
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_selects_and_orders(visible: str | None, expected: list[int]) -> None:
    assert [gpu.index for gpu in select_visible(INSTALLED, visible)] == expected


def test_missing_gpu_is_an_error_with_a_remedy() -> None:
    with pytest.raises(OperatorError, match="sees none") as caught:
        check_gpus([], 1, {})
    assert "engine.backend: torch" in caught.value.remedy


def test_too_few_gpus_name_the_key() -> None:
    with pytest.raises(OperatorError, match="4 GPUs, and sees 1") as caught:
        check_gpus([H100], 4, {})
    assert "workers.tensor_parallel" in caught.value.remedy


def test_engine_for_another_gpu_is_refused_and_one_for_this_is_not() -> None:
    check_gpus([H100], 1, {"compute_capability": "8.0, 9.0"})
    check_gpus([H100], 1, {})
    with pytest.raises(OperatorError, match=r"built for compute capability 8\.0") as caught:
        check_gpus([H100], 1, {"compute_capability": "8.0"})
    assert "H100" in caught.value.what
    assert "rebuilds" in caught.value.remedy
