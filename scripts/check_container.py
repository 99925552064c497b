"""Can the configured container runtime start the image? Writes `results/checks/container.json`."""

from pathlib import Path

from serving.deploy.checks.container import check_container
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.planning.gpu_assignment import existing_gpus, usable_gpus
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    needs_gpus = config.device == "cuda" and config.container.runtime != "none"
    gpus = usable_gpus(config.workers.gpus, existing_gpus()) if needs_gpus else []
    findings = check_container(config, gpus, report)
    conclude(judge("check_container", findings), Path(snakemake.output[0]), report=report)
