"""GPUs for the torch engine."""

import msgspec
from serving.deploy.checks.gpu import TorchFacts, TorchGpu, judge_gpu, not_needed
from unit.deploy.checks.finding_names import wrong

GIB = 1024**3
H100 = TorchGpu("H100", "sm_90", 78 * GIB, 80 * GIB, True)
ONE_GPU = TorchFacts(driver="580.95", version="2.13.0", cuda="13.0", gpus=[H100])


def test_cpu_engine_needs_no_gpu() -> None:
    (finding,) = not_needed("cpu")
    assert finding.ok


def test_gpu_that_fits_two_workers_is_fine() -> None:
    assert wrong(judge_gpu([0, 0], 16 * GIB, ONE_GPU)) == {}


def test_weights_that_cannot_fit_block_and_a_busy_gpu_warns() -> None:
    assert wrong(judge_gpu([0, 0], 60 * GIB, ONE_GPU))["gpu 0"].blocks
    busy = msgspec.structs.replace(ONE_GPU, gpus=[msgspec.structs.replace(H100, free_bytes=GIB)])
    assert wrong(judge_gpu([0], 16 * GIB, busy))["gpu 0"].warning


def test_gpu_torch_does_not_see_blocks() -> None:
    assert wrong(judge_gpu([0, 1], None, ONE_GPU))["gpu 1"].blocks


def test_wrong_arithmetic_blocks() -> None:
    sick = msgspec.structs.replace(ONE_GPU, gpus=[msgspec.structs.replace(H100, works=False)])
    assert "matrix product" in wrong(judge_gpu([0], None, sick))["gpu 0"].detail


def test_cpu_build_of_torch_and_a_missing_driver_are_two_findings() -> None:
    found = wrong(judge_gpu([0], None, TorchFacts(driver="", version="2.13.0+cpu")))
    assert "without CUDA" in found["torch"].detail
    assert "CUDA build" in found["torch"].remedy
    assert found["driver"].blocks
