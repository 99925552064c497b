"""Build or fetch the image that the serving image starts from. Writes `results/images/base.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.containers.image_build import build_base
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    base = build_base(parse(snakemake.config), Path(snakemake.output[0]).parent, report)
    report(f"base image: {base.detail}")
