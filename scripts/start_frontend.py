"""Start the frontend under the deployment's supervisor; it must answer a request."""

import msgspec
from serving.config import parse
from serving.deploy.planning.topology import Program
from serving.deploy.processes.launch import launch
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    program = msgspec.json.decode(snakemake.params.program, type=Program)
    launch(program, parse(snakemake.config), report)
