"""Can the configured container runtime start the image? Writes `results/checks/container.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks.container import check_container
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.planning.fingerprint import resolve_device
from serving.deploy.planning.placement import existing_gpus, usable_gpus
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    needed = resolve_device(config) == "cuda" and config.container.runtime != "none"
    gpus = usable_gpus(config.workers.gpus, existing_gpus()) if needed else []
    findings = check_container(config, gpus, report)
    conclude(judge("check_container", findings), Path(snakemake.output[0]), report=report)
