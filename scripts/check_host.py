"""Is this machine fit for the deployment? Writes `results/checks/host.json`."""

from pathlib import Path

from serving.config.resolve import worker_counts
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.host import judge_host, observe_host
from serving.deploy.checks.ports import judge_ports
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    run_dir = Path("run")
    num_workers = sum(worker_counts(config).values())
    findings = judge_host(config, num_workers, config.device, observe_host(run_dir))
    findings += judge_ports(config, run_dir)
    conclude(judge("check_host", findings), Path(snakemake.output[0]), report=report)
