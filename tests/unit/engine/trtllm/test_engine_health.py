"""Start, health and close of the adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from serving.engine.trtllm.engine import Timeouts
from serving.errors import EngineFailed, OperatorError
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import Sink, greedy, request
from unit.engine.trtllm_rig import (
    NEWEST,
    running,
)


@pytest.mark.usefixtures("newest")
async def test_silent_engine_fails_its_requests_and_takes_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "stuck"
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", f"hang@{stuck}")
    engine = rig.make_engine(folder, timeouts=Timeouts(health_s=0.1, probe_s=0.2))
    sink = Sink()
    await engine.start(sink)
    try:
        engine.submit(request("good", [5, 6, 7], greedy(4)))
        await sink.finished("good")
        stuck.touch()
        engine.submit(request("r", [5, 6, 7], greedy(4)))
        await sink.finished("r")
        error = sink.last["r"].error
        assert error is not None
        assert error.kind == "EngineFailed"
        with pytest.raises(EngineFailed, match="nothing within"):
            engine.submit(request("late", [5, 6, 7], greedy(4)))
    finally:
        await engine.close()


@pytest.mark.usefixtures("newest")
async def test_slow_engine_that_passes_its_probe_goes_on(folder: Path) -> None:
    async with running(folder, timeouts=Timeouts(health_s=0.005)) as (engine, sink):
        engine.submit(request("r", [5, 6, 7], greedy(100)))
        await sink.finished("r")
        assert sink.last["r"].finish_reason == "length"


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("fail", "means"),
    [("oom", "memory"), ("no_gpu", "no NVIDIA GPU"), ("hang:0", "generated nothing")],
)
async def test_failed_start_is_one_error_with_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fail: str, means: str
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", fail)
    with pytest.raises(OperatorError, match=means) as caught:
        await rig.make_engine(folder, timeouts=Timeouts(start_s=0.3)).start(Sink())
    assert caught.value.remedy


async def test_missing_library_and_unsupported_version_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig._forget()  # other tests of this process may have had the stand-in
    without = [entry for entry in sys.path if not (Path(entry) / "tensorrt_llm").exists()]
    monkeypatch.setattr(sys, "path", without)
    with pytest.raises(OperatorError, match="not installed"):
        await rig.make_engine(folder).start(Sink())
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.21.0"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(OperatorError, match=r"0\.21\.0"):
            await rig.make_engine(folder).start(Sink())
    finally:
        rig._forget()


@pytest.mark.usefixtures("newest")
async def test_engine_for_another_version_or_block_size_is_refused(folder: Path) -> None:
    manifest = rig.make_manifest(stamp={"tensorrt_llm": "1.2.1"})
    with pytest.raises(OperatorError, match=r"1\.2\.1") as caught:
        await rig.make_engine(folder, manifest=manifest).start(Sink())
    assert NEWEST in caught.value.what
    with pytest.raises(OperatorError, match=r"blocks of 16 tokens.*block_size` is 32"):
        await rig.make_engine(folder, block_size=32).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_unknown_argument_of_a_person_is_named(tmp_path: Path) -> None:
    engine_dir = rig.make_engine_dir(tmp_path, changes={"enable_magic": True})
    with pytest.raises(OperatorError, match=f"{NEWEST} has no argument `enable_magic`"):
        await rig.make_engine(engine_dir).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_built_engine_is_refused_where_the_backend_is_gone(folder: Path) -> None:
    manifest = rig.make_manifest(flow="trtllm-build")
    with pytest.raises(OperatorError, match="can no longer load"):
        await rig.make_engine(folder, manifest=manifest).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_close_ends_running_requests(folder: Path) -> None:
    engine, sink = rig.make_engine(folder), Sink()
    await engine.start(sink)
    engine.submit(request("r", [5, 6, 7], greedy(200)))
    await sink.started("r")
    await engine.close()
    assert sink.last["r"].finish_reason == "cancelled"
    await engine.close()  # nothing left to do
