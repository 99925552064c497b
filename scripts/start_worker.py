"""Start one worker under the deployment's supervisor; it is ready once it is registered."""

from pathlib import Path

import msgspec
from serving.config import parse
from serving.deploy.planning.topology import Program, joins
from serving.deploy.processes.launch import launch
from serving.deploy.rule_script import reporting
from serving.engine.manifest import load_manifest

with reporting(snakemake.log[0]) as report:
    program = msgspec.json.decode(snakemake.params.program, type=Program)
    config = parse(snakemake.config)
    if joins(config):
        from serving.deploy.cluster.membership import require_same_engine

        require_same_engine(load_manifest(Path(snakemake.input.engine).parent))
    launch(program, config, report)
