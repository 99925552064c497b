"""How many prefill and decode workers does a recorded workload need? Simulates; starts nothing."""

from serving.deploy.rule_script import rule_script
from serving.simulate.capacity import propose

with rule_script(snakemake) as (config, report):
    propose(config.plan, config.router, report=report)
