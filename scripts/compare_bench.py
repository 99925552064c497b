"""One table of this benchmark and the runs it is compared with."""

from pathlib import Path

import msgspec
from serving.deploy.bench.summary import Summary, comparison_table
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (_, report):
    summaries = [
        msgspec.json.decode(Path(path).read_bytes(), type=Summary)
        for path in snakemake.input.summaries
    ]
    lines = comparison_table(summaries)
    for line in ("", *lines, ""):
        report(line)
    Path(snakemake.output[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
