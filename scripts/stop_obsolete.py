"""Stop programs that no longer belong, then record the ones that do."""

import msgspec
from serving.deploy.processes.stop import stop_obsolete
from serving.deploy.processes.topology_record import TopologyRecord
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (_, report):
    stop_obsolete(msgspec.json.decode(snakemake.params.record, type=TopologyRecord), report)
