"""Stop the deployment: reverse order, whole process groups, nothing left."""

from serving.config import parse
from serving.deploy.processes.stop import stop_all
from serving.deploy.rule_script import telling

with telling(snakemake.log[0]) as say:
    stop_all(parse(snakemake.config), say)
