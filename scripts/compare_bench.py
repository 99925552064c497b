"""One table of the benchmark that was just run and those it is compared with."""

from pathlib import Path

import msgspec
from serving.deploy.bench.summary import Summary, comparison_table
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    summaries = [
        msgspec.json.decode(Path(path).read_bytes(), type=Summary)
        for path in snakemake.input.summaries
    ]
    lines = comparison_table(summaries)
    for line in ("", *lines, ""):
        report(line)
    Path(snakemake.output[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
