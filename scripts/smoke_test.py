"""Does the running service keep its promises? A table of checks; fails with the reason."""

import asyncio
from pathlib import Path

from serving.config.resolve import is_joining_node
from serving.deploy.report.service_spec import read_service_spec
from serving.deploy.report.smoke import conclude_smoke, run_smoke
from serving.deploy.rule_script import rule_script
from serving.errors import OperatorError

with rule_script(snakemake) as (config, report):
    if is_joining_node(config):
        raise OperatorError(
            f"this node works for {config.cluster.head}, which has the frontend",
            remedy="run `snakemake smoke_test` there",
        )
    spec = read_service_spec(Path("run"), config)
    conclude_smoke(asyncio.run(run_smoke(spec, report)), report)
