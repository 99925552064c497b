"""Findings by name."""

from serving.deploy.checks.findings import Finding


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if not finding.ok}
