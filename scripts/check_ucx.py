"""Does UCX carry KV blocks between processes here? Writes `results/checks/ucx.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.ucx import judge_ucx, try_ucx
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    topology = config.deployment.topology
    findings = judge_ucx(config, topology.startswith("disagg"), try_ucx())
    conclude(judge("check_ucx", findings), Path(snakemake.output[0]), report=report)
