"""What a contained program gets to see: folders, links, devices, environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serving.config import ContainerConfig, parse
from serving.config.process import WorkerSettings, read_settings
from serving.deploy.containers.worker_command import (
    CACHE,
    MODELS,
    contain,
    contain_worker,
    link_targets,
)
from serving.deploy.planning.source_digest import SCRIPTS
from unit.deploy.resolved import plan_for_test


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    deployment = tmp_path / "deployment"
    deployment.mkdir()
    monkeypatch.chdir(deployment)
    return deployment


def container(**more: object) -> ContainerConfig:
    raw = {"runtime": "podman", "image": "localhost/x:1", **more}
    return parse({"container": raw}).container


def mounts(command: list[str]) -> dict[str, bool]:
    """Path inside to whether it can be written."""
    prefix = "--mount=type=bind,src="
    found = [flag.removeprefix(prefix) for flag in command if flag.startswith(prefix)]
    return {f.partition(",dst=")[2].removesuffix(",ro"): not f.endswith(",ro") for f in found}


def test_worker_reads_code_model_and_engine_and_writes_run_and_cache(here: Path) -> None:
    made = plan_for_test({"deployment": {"topology": "agg"}}, engine_fingerprint="e1")
    settings = here / "worker.json"
    settings.write_text(made["worker-agg-0"].settings)
    process = read_settings(settings, WorkerSettings)
    Path(process.engine_dir).mkdir(parents=True)
    MODELS.mkdir(parents=True)
    contained = contain_worker(container(), "worker-agg-0", process, {"OMP_NUM_THREADS": "3"})
    assert mounts(contained.command) == {
        str(SCRIPTS): False,
        str(here / "results/cache"): True,
        str(here / "results/engines/e1"): False,
        str(here / "results/models"): False,
        str(here / "run"): True,
    }
    assert contained.command[-4:] == ["python3", "-m", "serving.worker", "run/worker-agg-0.json"]
    assert f"--workdir={here}" in contained.command
    assert f"--user={os.getuid()}:{os.getgid()}" in contained.command
    assert contained.removal[-1] == contained.command[3].removeprefix("--name=")


def test_values_of_the_environment_are_the_clients_business(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    contained = contain(container(), ["true"], name="x", env={"SECRET": "s3cret"})
    assert {"--env=SECRET", "--env=UCX_TLS", "--env=LAUNCH_ID"} <= set(contained.command)
    assert "--env=SLURM_JOB_ID" not in contained.command
    assert "s3cret" not in " ".join(contained.command)
    assert contained.env["SECRET"] == "s3cret"
    assert contained.env["UCX_TLS"] == "tcp"
    assert "HOME" not in contained.env, "the client keeps its own, with its logins and images"


def test_gpus_are_those_the_worker_would_see_outside(here: Path) -> None:
    contained = contain(container(), ["true"], name="x", env={"CUDA_VISIBLE_DEVICES": "2,0"})
    assert "--device=nvidia.com/gpu=0" in contained.command
    assert "--device=nvidia.com/gpu=2" in contained.command
    assert contained.env["CUDA_VISIBLE_DEVICES"] == "1,0"


def test_what_links_point_to_is_mounted_under_that_name(here: Path, tmp_path: Path) -> None:
    store, engine = tmp_path / "store", here / "engine"
    store.mkdir()
    engine.mkdir()
    (store / "blob").write_text("weights")
    (store / "model.safetensors").symlink_to("blob")
    (engine / "model.safetensors").symlink_to(store / "model.safetensors")
    (engine / "same.json").symlink_to("model.safetensors")
    (engine / "gone").symlink_to(store / "gone")
    contained = contain(container(), ["true"], name="x", env={}, read_only=[Path("engine")])
    paths = mounts(contained.command)
    assert paths[str(store / "model.safetensors")] is False
    assert not any("gone" in path or path == str(store) for path in paths)


def test_linked_folder_brings_what_its_own_links_name_and_loops_end(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
    (a / "to_b").symlink_to(b)
    (b / "to_c").symlink_to(c)
    (c / "to_b").symlink_to(b)
    (c / "to_a").symlink_to(a)
    assert link_targets(a) == {b, c}


def test_mounts_of_the_config_are_read_only_and_win(here: Path) -> None:
    scripts = str(SCRIPTS)
    contained = contain(container(mounts={"/usr": scripts}), ["true"], name="x", env={})
    assert f"--mount=type=bind,src=/usr,dst={scripts},ro" in contained.command


def test_cache_outlives_the_run_and_is_home_inside(here: Path) -> None:
    contained = contain(container(), ["true"], name="x", env={})
    assert CACHE.is_dir()
    assert f"--env=HOME={CACHE.absolute()}" in contained.command


def test_reference_of_apptainer_means_the_file_made_of_it(here: Path) -> None:
    config = container(runtime="apptainer", image="docker://nvcr.io/nvidia/x:1")
    contained = contain(config, ["true"], name="x", env={})
    assert "results/images/nvcr.io-nvidia-x-1.sif" in contained.command
