"""Start etcd under the deployment's supervisor, and prove it ready."""

import msgspec
from serving.config import parse
from serving.deploy.launch import launch
from serving.deploy.rule_script import telling
from serving.deploy.topology import Program

with telling(snakemake.log[0]) as say:
    program = msgspec.json.decode(snakemake.params.program, type=Program)
    launch(program, parse(snakemake.config), say)
