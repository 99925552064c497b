"""Findings: the results of checks, and how a check rule ends.

A finding is one sentence about one thing, with a remedy when the thing is wrong. A warning is wrong
but lets the deployment go on. The checks beside this module return findings, and so does `doctor`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.errors import OperatorError
from serving.progress import Report


class Finding(Struct, frozen=True, omit_defaults=True):
    """`ok`: the thing is as it should be. `warning`: the deployment works without it, too."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    warning: bool = False

    @property
    def blocks(self) -> bool:
        return not self.ok and not self.warning


class CheckResult(Struct, frozen=True):
    """`results/checks/{name}.json`. `created` is a Unix time in seconds."""

    name: str
    ok: bool
    checks: list[Finding]
    created: float


def judge(name: str, findings: Iterable[Finding]) -> CheckResult:
    """A check is ok when no finding blocks. Findings that are ok lose their remedy."""
    checks = [Finding(f.name, True, f.detail) if f.ok else f for f in findings]
    return CheckResult(name, not any(f.blocks for f in checks), checks, time.time())


def render(finding: Finding) -> str:
    """One finding as lines for a person."""
    verdict = "ok" if finding.ok else "warning" if finding.warning else "FAILED"
    line = f"{verdict:<8}{finding.name}: {finding.detail}"
    return line if finding.ok or not finding.remedy else f"{line}\n        -> {finding.remedy}"


def conclude(result: CheckResult, path: Path, *, report: Report) -> None:
    """Write `result` to `path`, report warnings, and raise when a finding blocks.

    The OperatorError holds every blocking finding with its remedy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    wrong = [f for f in result.checks if not f.ok]
    for finding in wrong:
        if finding.warning:
            report(f"{result.name}: {render(finding)}")
    if result.ok:
        report(f"{result.name}: ok ({len(result.checks)} checks, {len(wrong)} warnings)")
        return
    blocking = [f for f in wrong if f.blocks]
    what = "; ".join(f"{f.name}: {f.detail}" for f in blocking)
    raise OperatorError(
        f"{result.name} failed: {what}", remedy="; ".join(f.remedy for f in blocking if f.remedy)
    )
