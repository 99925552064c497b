"""One table of the benchmark that was just run and those it is compared with."""

from pathlib import Path

import msgspec
from serving.deploy.bench.run import Summary, table
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    summaries = [
        msgspec.json.decode(Path(path).read_bytes(), type=Summary)
        for path in snakemake.input.summaries
    ]
    report("")
    for line in table(summaries):
        report(line)
    report("")
    Path(snakemake.output[0]).write_text("\n".join(table(summaries)) + "\n", encoding="utf-8")
