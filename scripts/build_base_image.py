"""Build or fetch the image that the serving image starts from. Writes `results/images/base.json`."""

from pathlib import Path

from serving.deploy.containers.image_build import build_base
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    base = build_base(config, Path(snakemake.output[0]).parent, report)
    report(f"base image: {base.detail}")
