"""One table of this benchmark and the runs it is compared with."""

from pathlib import Path

import msgspec
from serving.console import without_colours
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
    Path(snakemake.output[0]).write_text(
        "".join(f"{without_colours(line)}\n" for line in lines), encoding="utf-8"
    )
