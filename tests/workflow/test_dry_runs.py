"""The DAG without running it: what would be done, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from serving.deploy.planning.gpu_assignment import existing_gpus

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.yaml"))


def snakemake(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in `directory`; stdout and stderr together."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    return subprocess.run(
        [*command, "--directory", str(directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


def files(directory: Path) -> dict[str, bytes]:
    """Everything but Snakemake's own notes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".snakemake" not in path.parts
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_dry_run_of_every_example_succeeds_and_writes_nothing(
    example: Path, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "models").symlink_to(ROOT / "config" / "models")
    done = snakemake(tmp_path, "-n", "--configfile", str(example))
    wanted = (yaml.safe_load(example.read_text()).get("workers") or {}).get("gpus") or []
    if "gpu" in example.stem and not set(wanted) | {0} <= set(existing_gpus()):
        assert done.returncode != 0
        assert "config key `workers.gpus`" in done.stdout or "`engine.device`" in done.stdout
    else:
        assert done.returncode == 0, done.stdout
        assert "start_frontend" in done.stdout
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("target", "num_workers"),
    [("serve_agg", 1), ("serve_agg_router", 1), ("serve_disagg", 2), ("serve_disagg_router", 2)],
)
def test_target_serves_its_topology(target: str, num_workers: int, tmp_path: Path) -> None:
    done = snakemake(tmp_path, "-n", target)
    assert done.returncode == 0, done.stdout
    [count] = {line.split()[1] for line in done.stdout.splitlines() if "start_worker  " in line}
    assert int(count) == num_workers


def test_rulegraph_leads_from_model_to_frontend(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "--rulegraph", "dot", "serve_disagg")
    assert done.returncode == 0, done.stdout
    rules = ["download_model", "build_engine", "stop_obsolete", "start_worker", "start_frontend"]
    for rule in [*rules, "start_etcd", "start_nats", "check_ucx", "fetch_binaries"]:
        assert f'label = "{rule}"' in done.stdout, rule
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("workers={decoed: 2}", ("config key `workers.decoed`", "did you mean `decode`")),
        ("workers={decode: two}", ("config key `workers.decode`", "'two'")),
        ("frontend-port=2379", ("port 2379 is already `frontend.port`",)),
        ("workers={gpus: [97]}", ("config key `workers.gpus`", "GPU 97")),
        ("model-id=not a hub id", ("config key `model.id`",)),
    ],
)
def test_bad_config_is_one_clear_message(
    setting: str, said: tuple[str, ...], tmp_path: Path
) -> None:
    done = snakemake(tmp_path, "serve_disagg", "--config", setting)
    assert done.returncode == 1
    for part in said:
        assert part in done.stdout
    assert "Traceback" not in done.stdout
    assert "<module>" not in done.stdout
    assert files(tmp_path) == {}


def test_two_topologies_at_once_are_refused(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "serve_agg", "serve_disagg")
    assert done.returncode == 1
    assert "serve_agg and serve_disagg cannot be served at the same time" in done.stdout


def test_dry_run_leaves_stale_markers_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "etcd.up").write_text("{}")
    before = files(tmp_path)
    assert snakemake(tmp_path, "-n", "serve_disagg").returncode == 0
    assert files(tmp_path) == before


def test_smoke_test_starts_nothing_where_something_is_deployed(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "-n", "smoke_test")
    assert "start_frontend" in done.stdout
    run = tmp_path / "run"
    run.mkdir()
    record = {"topology": "agg", "programs": [], "engine_fingerprint": "x"}
    (run / "topology.json").write_text(json.dumps(record))
    done = snakemake(tmp_path, "-n", "smoke_test")
    assert done.returncode == 0, done.stdout
    assert "start_frontend" not in done.stdout
    done = snakemake(tmp_path, "-n", "smoke_test", "serve_agg")
    assert "start_frontend" in done.stdout


def test_status_and_stop_succeed_when_nothing_runs(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "status", "stop")
    assert done.returncode == 0, done.stdout
    assert "Nothing runs here" in done.stdout
    assert "nothing runs here" in done.stdout
    assert not (tmp_path / "run").exists()


def test_plan_proposes_workers_for_a_recorded_workload(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 500 * n,
            "input_length": 5000,
            "output_length": 50,
            "hash_ids": [n * 10 + b for b in range(10)],
        }
        for n in range(40)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = snakemake(tmp_path, "plan", "--config", f"plan-trace={trace}", "plan-ttft_s=0.6")
    assert done.returncode == 0, done.stdout
    assert "workers:\n  prefill: 1\n  decode: 1" in done.stdout


def test_failed_script_ends_with_the_remedy(tmp_path: Path) -> None:
    settings = "container={runtime: podman, image: nobody/no-such-image}"
    done = snakemake(tmp_path, "results/checks/container.json", "--config", settings)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    [*_, last] = done.stdout.split("Exiting because a job execution failed")
    assert "  -> " in last
    assert not list((tmp_path / ".snakemake").glob("failures-*"))


def test_folder_of_an_older_version_is_served_again(tmp_path: Path) -> None:
    """`run/` is as recorded, without the processes: everything starts, and status finds nothing."""
    recorded = ROOT / "tests" / "recorded_runs" / "before_control_services"
    shutil.copytree(recorded, tmp_path / "run")
    done = snakemake(tmp_path, "status")
    assert done.returncode == 0, done.stdout
    assert "Nothing runs here" in done.stdout
    done = snakemake(tmp_path, "-n", "serve_disagg")
    assert done.returncode == 0, done.stdout
    assert "build_engine" in done.stdout
    assert "start_frontend" in done.stdout


def test_run_that_leaves_steps_out_does_not_claim_to_serve(tmp_path: Path) -> None:
    """Its markers may be new and its jobs done: only programs that answer are announced."""
    done = snakemake(
        tmp_path, "serve_agg", "--until", "check_host", "--config", "engine-device=cpu"
    )
    assert done.returncode == 0, done.stdout
    assert "Serving" not in done.stdout
    assert "the service is not complete: etcd, nats, worker-agg-0, frontend" in done.stdout
    done = snakemake(tmp_path, "serve_agg", "--touch")
    assert "Serving" not in done.stdout


def test_python_in_a_folder_with_spaces_runs_the_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "it's 100% odd"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python3*/site-packages")
    own = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "packages.pth").write_text("".join(f"{path}\n" for path in own))
    (folder / "work").mkdir()
    done = subprocess.run(
        [folder / "bin/python", "-m", "snakemake", "-s", ROOT / "Snakefile", "status"],
        cwd=folder / "work",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing runs here" in done.stdout
