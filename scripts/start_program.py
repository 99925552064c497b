"""Start one program under the deployment's supervisor, and prove that it is ready.

Every `start_*` rule uses this script; the program comes as a parameter.
"""

from pathlib import Path

import msgspec
from serving.config.resolve import is_joining_node
from serving.deploy.planning.program import Program
from serving.deploy.processes.launch import launch
from serving.deploy.rule_script import rule_script
from serving.engine.integrity import verify_weights
from serving.engine.manifest import load_manifest

with rule_script(snakemake) as (config, report):
    program = msgspec.json.decode(snakemake.params.program, type=Program)
    if is_joining_node(config):  # which runs workers alone
        from serving.deploy.cluster.join import require_same_engine

        require_same_engine(load_manifest(Path(snakemake.input.engine).parent))
    if program.name.startswith("worker-"):
        engine_dir = Path(snakemake.input.engine).parent
        verify_weights(engine_dir, load_manifest(engine_dir))
    launch(program, config, report)
