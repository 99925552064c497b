"""Whatever the adapter uses of TensorRT-LLM is in the contract of each version, or guarded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
COVERAGE = ROOT / "tests" / "standin" / "coverage.py"
ENGINE = ROOT / "scripts" / "serving" / "engine"
VERSIONS = ["1.0.0", "1.1.0", "1.2.1", "1.3.0rc27"]


def coverage(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COVERAGE), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def percentages(output: str) -> dict[str, float]:
    found = re.findall(r"^TensorRT-LLM (\S+)\n(?:  .*\n)*?  ([\d.]+)% covered", output, re.M)
    return {version: float(percentage) for version, percentage in found}


def test_the_source_uses_only_what_the_contract_has() -> None:
    done = coverage("--no-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert percentages(done.stdout) == dict.fromkeys(VERSIONS, 100.0)


@pytest.mark.integration
def test_a_run_of_the_adapter_uses_only_what_the_contract_has() -> None:
    done = coverage()
    assert done.returncode == 0, done.stdout + done.stderr
    assert percentages(done.stdout) == dict.fromkeys(VERSIONS, 100.0)


@pytest.fixture
def engine_copy(tmp_path: Path) -> Path:
    copy = tmp_path / "engine"
    shutil.copytree(ENGINE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} no longer has {old!r}: choose another place to break"
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("filename", "old", "new", "name"),
    [
        ("trtllm/requests/completion.py", ".finish_reason", ".finish_cause", "finish_cause"),
        ("trtllm/requests/running.py", "streaming=", "stream=", "LLM.generate_async.stream"),
        (
            "trtllm/requests/sampling.py",
            '"detokenize"',
            '"detokenise"',
            "SamplingParams.detokenise",
        ),
        ("trtllm/reports/stats.py", '"maxNumBlocks"', '"numBlocks"', "stats.numBlocks"),
        ("trtllm/reports/kv_events.py", '["event_id"]', '["id"]', "kv_event.id"),
    ],
)
def test_a_made_up_name_is_found(
    engine_copy: Path, filename: str, old: str, new: str, name: str
) -> None:
    edit(engine_copy / filename, old, new)
    done = coverage("--no-run", "--engine-dir", str(engine_copy))
    assert done.returncode == 1
    assert name in done.stdout


def test_an_attribute_that_only_a_later_version_has_is_found(engine_copy: Path) -> None:
    """Without a probe, `cached_tokens` cannot be read: 1.0 has none."""
    requests = engine_copy / "trtllm" / "requests" / "running.py"
    text = requests.read_text()
    probe = re.search(r'getattr\((\w+), "cached_tokens", None\)', text)
    assert probe, "the probe is gone: choose another attribute"
    requests.write_text(text.replace(probe[0], f"{probe[1]}.cached_tokens", 1))
    done = coverage("--no-run", "--engine-dir", str(engine_copy))
    assert done.returncode == 1
    found = percentages(done.stdout)
    assert found["1.0.0"] < 100
    assert found["1.3.0rc27"] == 100


def test_a_scan_that_understands_nothing_fails(engine_copy: Path) -> None:
    """Renamed variables must not pass for full coverage."""
    for path in (engine_copy / "trtllm").rglob("*.py"):
        path.write_text(re.sub(r"\bcompletion\b", "answer", path.read_text()))
    edit(engine_copy / "trtllm" / "engine.py", "result.outputs[0].token_ids", "result.outputs[0]")
    done = coverage("--no-run", "--engine-dir", str(engine_copy))
    assert done.returncode == 1
    assert "no use of CompletionOutput was found" in done.stdout
