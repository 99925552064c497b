"""Stop programs that no longer belong, then record what does."""

import msgspec
from serving.deploy.processes.markers import Record
from serving.deploy.processes.stop import stop_obsolete
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    stop_obsolete(msgspec.json.decode(snakemake.params.record, type=Record), report)
