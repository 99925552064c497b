"""Is this machine fit for the deployment? Writes `results/checks/host.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.host import judge_host, observe_host
from serving.deploy.checks.ports import judge_ports
from serving.deploy.planning.fingerprint import resolve_device
from serving.deploy.planning.topology import workers_here
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    run_dir = Path("run")
    findings = judge_host(
        config, sum(workers_here(config).values()), resolve_device(config), observe_host(run_dir)
    )
    findings += judge_ports(config, run_dir)
    conclude(judge("check_host", findings), Path(snakemake.output[0]), report=report)
