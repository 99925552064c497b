"""Stop the deployment: whole process groups in reverse order, until nothing is left."""

from serving.deploy.processes.stop import stop_all
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    stop_all(config, report)
