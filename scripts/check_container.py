"""Can the configured container runtime start the image? Writes `results/checks/container.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks.container import check_container
from serving.deploy.checks.report import conclude, judge
from serving.deploy.planning.fingerprint import resolve_device
from serving.deploy.planning.placement import existing_gpus, usable_gpus
from serving.deploy.rule_script import telling

with telling(snakemake.log[0]) as say:
    config = parse(snakemake.config)
    needed = resolve_device(config) == "cuda" and config.container.runtime != "none"
    gpus = usable_gpus(config.workers.gpus, existing_gpus()) if needed else []
    findings = check_container(config, gpus, say)
    conclude(judge("check_container", findings), Path(snakemake.output[0]), say=say)
