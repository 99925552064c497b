"""Why is it not working? Looks at every part of the deployment in the working directory.

Looking changes nothing. The only traffic is one short prompt, sent twice when the service is
ready: the second one must be routed to the cached blocks of the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serving.config import Config
from serving.console import table_lines
from serving.deploy.checks.findings import Finding
from serving.deploy.checks.ports import judge_ports
from serving.deploy.processes.launchers import RUN
from serving.deploy.report.diagnosis import diagnose, judge_routing
from serving.deploy.report.evidence import cluster_position, collect_evidence
from serving.deploy.report.service_client import ServiceClient, ServiceFailed
from serving.deploy.report.service_spec import ServiceSpec, read_service_spec
from serving.deploy.report.smoke import cached_tokens, long_prompt
from serving.errors import OperatorError
from serving.progress import Report


async def examine(config: Config) -> list[Finding]:
    """All findings about the deployment, from `run/`, `logs/` and the running programs."""
    spec = read_service_spec(RUN, config)
    evidence = await collect_evidence(spec, cluster_position(config))
    findings = [*diagnose(evidence), *judge_ports(config, RUN)]
    if evidence.ready and evidence.ready["ready"]:
        findings.append(await _prove_routing(spec, evidence.ready["policy"]))
    return findings


def conclude_doctor(findings: Sequence[Finding], report: Report) -> None:
    """Report every finding. Raises OperatorError when one of them is more than a warning."""
    for line in table_lines(("", "", ""), [_row(finding) for finding in findings]):
        report(line)
    wrong = [finding for finding in findings if finding.blocks]
    if wrong:
        first = wrong[0]
        raise OperatorError(
            f"{len(wrong)} of {len(findings)} findings are wrong, first {first.name}: "
            f"{first.detail}",
            remedy=first.remedy,
        )
    report(f"nothing wrong in {len(findings)} findings")


def _row(finding: Finding) -> tuple[str, str, str]:
    verdict = "ok" if finding.ok else "warning" if finding.warning else "FAILED"
    remedy = f"\n-> {finding.remedy}" if finding.remedy and not finding.ok else ""
    return verdict, finding.name, finding.detail + remedy


async def _prove_routing(spec: ServiceSpec, policy: str) -> Finding:
    """Send one prompt twice and see what was cached, and whether the index knew."""
    try:
        async with ServiceClient(spec.url, spec.headers, spec.tls_cert_file) as service:
            await service.first_model()
            prompt = long_prompt(spec.block_size, service.max_model_len)
            cold = cached_tokens(await service.chat(prompt, 4))
            await asyncio.sleep(0.5)  # its cache events are on their way to the index
            before = await service.samples("serving_prefix_hit_tokens_total")
            warm = cached_tokens(await service.chat(prompt, 4))
            after = await service.samples("serving_prefix_hit_tokens_total")
    except ServiceFailed as exc:
        return Finding(
            "kv routing", False, f"the prompt failed: {exc}", "logs/frontend.log has the request"
        )
    # A prompt that goes through two instances has hits on both; one that a decode instance computes
    # by itself, as it does when it holds all but a block, on that one alone.
    known = max((value - before.get(labels, 0.0) for labels, value in after.items()), default=0.0)
    return judge_routing(policy, cold, warm, known, spec.block_size)
