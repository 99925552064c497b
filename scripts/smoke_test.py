"""Does the running service do what it promises? A table of checks; fails with the reason."""

import asyncio
from pathlib import Path

from serving.config import parse
from serving.deploy.rule_script import telling
from serving.deploy.service import expected
from serving.deploy.smoke import conclude_smoke, run_smoke

with telling(snakemake.log[0]) as say:
    told = expected(Path("run"), parse(snakemake.config))
    conclude_smoke(asyncio.run(run_smoke(told, say=say)), say=say)
