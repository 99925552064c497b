"""What runs here: programs, health, model, URL, cache hit rate."""

from serving.config import parse
from serving.deploy.report.status import report
from serving.deploy.rule_script import telling

with telling(snakemake.log[0]) as say:
    for line in report(parse(snakemake.config)):
        say(line)
