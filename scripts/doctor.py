"""Why is it not working? Findings with remedies; fails when something is wrong."""

import asyncio

from serving.deploy.report.doctor import conclude_doctor, examine
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    conclude_doctor(asyncio.run(examine(config)), report)
