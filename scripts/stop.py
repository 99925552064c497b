"""Stop the deployment: reverse order, whole process groups, nothing left."""

from serving.config import parse
from serving.deploy.processes.stop import stop_all
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    stop_all(parse(snakemake.config), report)
