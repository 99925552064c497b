"""How many prefill and decode workers does a recorded workload need? Simulates; starts nothing."""

from serving.config import parse
from serving.deploy.rule_script import telling
from serving.simulate.plan import propose

config = parse(snakemake.config)
with telling(snakemake.log[0]) as say:
    propose(config.plan, config.router, say=say)
