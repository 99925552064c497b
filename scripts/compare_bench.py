"""One table of this benchmark and the runs it is compared with."""

from pathlib import Path

import msgspec
from serving.deploy.bench.run import Summary, table
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (_, report):
    summaries = [
        msgspec.json.decode(Path(path).read_bytes(), type=Summary)
        for path in snakemake.input.summaries
    ]
    report("")
    for line in table(summaries):
        report(line)
    report("")
    Path(snakemake.output[0]).write_text("\n".join(table(summaries)) + "\n", encoding="utf-8")
