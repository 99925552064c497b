"""Does the running service do what it promises? A table of checks; fails with the reason."""

import asyncio
from pathlib import Path

from serving.config import parse
from serving.deploy.planning.topology import joins
from serving.deploy.report.service import expected
from serving.deploy.report.smoke import conclude_smoke, run_smoke
from serving.deploy.rule_script import reporting
from serving.errors import OperatorError

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    if joins(config):
        raise OperatorError(
            f"this node works for {config.cluster.head}, which has the frontend",
            remedy="run `snakemake smoke_test` there",
        )
    told = expected(Path("run"), config)
    conclude_smoke(asyncio.run(run_smoke(told, report=report)), report=report)
