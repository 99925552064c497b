"""Does UCX transfer KV blocks between processes here? Writes `results/checks/ucx.json`."""

from pathlib import Path

from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.ucx import judge_ucx, try_ucx
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    findings = judge_ucx(config, config.topology.startswith("disagg"), try_ucx())
    conclude(judge("check_ucx", findings), Path(snakemake.output[0]), report=report)
