"""Test code. Is everything that the adapter uses of TensorRT-LLM in the contract?

    python tests/standin/coverage.py [--engine-dir scripts/serving/engine] [--no-run]

For each supported version: every attribute, keyword, field and JSON key that the adapter's source
uses (`adapter_scan`), that the rendered arguments have, and that a run on the stand-in showed; and
where the contract has it. Exit 1 when a version lacks one that is not guarded by a probe.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(HERE), str(SCRIPTS)]

from adapter_scan import Use, carried_whole, names_of, unknown_attributes, uses  # noqa: E402
from install import install, load_contract  # noqa: E402

RUN_S = 240.0
_ALWAYS_USED = {
    *("LLM", "LLM.generate_async", "SamplingParams", "DisaggregatedParams", "RequestOutput"),
    *("CompletionOutput", "TimingMetrics", "kv_event", "stats", "modules", "tensorrt_llm"),
    *("LLM.get_kv_cache_events_async", "LLM.get_stats_async"),
}
"""Of each of these the scan must find a use, or it no longer understands the source."""

_SECTIONS = {
    "kv_cache_config": "KvCacheConfig",
    "cache_transceiver_config": "CacheTransceiverConfig",
    "scheduler_config": "SchedulerConfig",
    "cuda_graph_config": "CudaGraphConfig",
}


@dataclass
class Report:
    """`covered` are (use, where the contract has it); `guarded` a version may lack."""

    version: str
    covered: list[tuple[Use, str]] = field(default_factory=list)
    guarded: list[Use] = field(default_factory=list)
    missing: list[Use] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # used at run time, not found in the source

    @property
    def percentage(self) -> float:
        num_good = len(self.covered) + len(self.guarded)
        return 100.0 * num_good / max(1, num_good + len(self.missing) + len(self.unseen))

    def lines(self) -> list[str]:
        marks = [(use, f"contract: {source}") for use, source in self.covered]
        marks += [(use, "not in this version; guarded by a probe") for use in self.guarded]
        marks += [(use, "NOT IN THE CONTRACT") for use in self.missing]
        lines = [f"  {use.name:<52} {use.where:<24} {mark}" for use, mark in sorted(marks)]
        lines += [
            f"  {name:<52} {'at run time':<24} NOT FOUND IN THE SOURCE" for name in self.unseen
        ]
        return lines


def rendered(version: str) -> list[Use]:
    """The arguments that are written for `version`, all roles and flows. The worker drops those
    that its version lacks, so each counts as guarded."""
    from serving import config as configs
    from serving.engine.trtllm.build import llm_args, target
    from serving.engine.trtllm.versions import LAST_WITH_TENSORRT, parse_version

    found: list[Use] = []
    parsed = parse_version(version)
    raw: dict[str, Any] = {
        "engine": {
            "backend": "tensorrt_llm",
            "block_size": 32,
            "max_model_len": 2048,
            "kv_cache_tokens": 4096,
            "host_cache_bytes": 1 << 20,
        },
        "kv_transfer": {"transport": "ucx"},
    }
    config = configs.parse(raw)
    for flow in ("pytorch", "trtllm-build"):
        if flow == "trtllm-build" and parsed.line > LAST_WITH_TENSORRT:
            continue
        owner = "TorchLlmArgs" if flow == "pytorch" else "TrtLlmArgs"
        for role in ("agg", "prefill", "decode"):
            arguments = llm_args.arguments(
                config,
                role,
                version=parsed,
                flow=flow,
                spread=target.Parallelism(),
                dtype="bfloat16",
                model=".",
            )
            for key, value in arguments.items():
                found.append(Use(owner, key, True, f"llm_args-{role}.yaml"))
                if isinstance(value, dict) and key in _SECTIONS:
                    found += [Use(_SECTIONS[key], k, True, f"llm_args-{role}.yaml") for k in value]
    return list({(use.owner, use.member): use for use in found}.values())


def recorded(version: str, folder: Path) -> list[str]:
    """`Class.member` names that a run of the adapter on the stand-in used."""
    root = install(folder / version, version)
    touches = folder / f"{version}.touches"
    env = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{SCRIPTS}{os.pathsep}{ROOT / 'tests'}",
        "STANDIN_TRTLLM_TOUCHES": str(touches),
        "STANDIN_TRTLLM_TRANSPORT": "tcp",
        "OMP_NUM_THREADS": "1",
    }
    work = folder / f"{version}.work"
    command = [sys.executable, "-P", str(HERE / "recorded_run.py"), str(work), version]
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the run on {version} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return sorted(set(touches.read_text().split()))


def check(version: str, found: list[Use], run: list[str], contract: Any) -> Report:
    """Hold what is used against `version`; a probe may miss what another version has."""
    report = Report(version)
    here = contract.classes(version)
    elsewhere = [contract.classes(other) for other in contract.versions()]
    for use in {(use.owner, use.member, use.is_probe): use for use in reversed(found)}.values():
        if use.owner == "modules":
            source = "modules" if use.member in here else None
            known = any(use.member in each for each in elsewhere)
        else:
            member = here.get(use.owner, {}).get(use.member)
            source = None if member is None else member.source
            known = any(use.member in each.get(use.owner, {}) for each in elsewhere)
        if source is not None:
            report.covered.append((use, source))
        elif use.is_probe and known:
            report.guarded.append(use)
        else:
            report.missing.append(use)
    seen = {use.name for use in found}
    owners = {use.owner for use in found}
    report.unseen = [name for name in run if name not in seen and name not in owners]
    return report


def reports(engine_dir: Path, *, run: bool) -> tuple[list[Report], list[str]]:
    """One per supported version, and what is wrong whatever the version."""
    contract = load_contract()
    found = uses(engine_dir)
    wrong = [
        f"no use of {owner} was found: adapter_scan.py has to learn its new name"
        for owner in sorted(_ALWAYS_USED - {use.owner for use in found})
    ]
    everything = set().union(*(names_of(contract.classes(v)) for v in contract.versions()))
    wrong += [
        f"{where}: `.{name}` is known to nobody"
        for name, where in unknown_attributes(engine_dir, SCRIPTS / "serving", everything)
    ]
    made = []
    with tempfile.TemporaryDirectory(prefix="standin-") as folder:
        for version in contract.versions():
            names = recorded(version, Path(folder)) if run else []
            whole = [
                Use(owner, member, True, "every field")
                for owner in carried_whole(engine_dir)
                for member in contract.classes(version)[owner]
            ]
            made.append(check(version, found + rendered(version) + whole, names, contract))
    return made, wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path, default=SCRIPTS / "serving" / "engine")
    parser.add_argument("--no-run", action="store_true", help="only read the source")
    args = parser.parse_args(argv)
    made, wrong = reports(args.engine_dir, run=not args.no_run)
    for report in made:
        print(f"TensorRT-LLM {report.version}")
        print("\n".join(report.lines()))
        print(
            f"  {report.percentage:.1f}% covered: {len(report.covered)} in the contract, "
            f"{len(report.guarded)} guarded by a probe, "
            f"{len(report.missing) + len(report.unseen)} missing\n"
        )
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong) or any(report.missing or report.unseen for report in made))


if __name__ == "__main__":
    sys.exit(main())
