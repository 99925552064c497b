"""Can the configured container runtime start the image? Writes `results/checks/container.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks import conclude, judge
from serving.deploy.checks_container import check_container
from serving.deploy.rule_script import telling

with telling(snakemake.log[0]) as say:
    findings = check_container(parse(snakemake.config).container)
    conclude(judge("check_container", findings), Path(snakemake.output[0]), say=say)
