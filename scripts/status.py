"""What runs here: programs, health, model, URL, cache hit rate."""

from serving.config import parse
from serving.deploy.report import status
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    for line in status.report(parse(snakemake.config)):
        report(line)
