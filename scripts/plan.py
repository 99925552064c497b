"""How many prefill and decode workers does a recorded workload need? Simulates; starts nothing."""

from serving.config import parse
from serving.deploy.rule_script import reporting
from serving.simulate.plan import propose

config = parse(snakemake.config)
with reporting(snakemake.log[0]) as report:
    propose(config.plan, config.router, report=report)
