"""What runs here: programs, health, model, URL, cache hit rate."""

from serving.deploy.report.status import report_status
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    report_status(config, report)
