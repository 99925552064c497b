"""Build the image that workers run in. Input: base.json. Writes `results/images/serving.json`."""

from pathlib import Path

from serving.deploy.containers.image_build import build_serving, read_base
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    base = read_base(Path(snakemake.input.base))
    image = build_serving(config, base, Path(snakemake.output[0]).parent, report)
    report(f"image: {image.file or image.image} (used unless container.image is set)")
