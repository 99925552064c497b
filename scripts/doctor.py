"""Why is it not working? Findings with remedies; fails when something is wrong."""

import asyncio

from serving.config import parse
from serving.deploy.report.doctor import conclude_doctor, examine
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    conclude_doctor(asyncio.run(examine(parse(snakemake.config))), report=report)
