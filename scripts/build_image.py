"""Build the image that workers run in. Input: base.json. Writes `results/images/serving.json`."""

from pathlib import Path

from serving.config import parse
from serving.deploy.containers.image_build import build_serving, read_base
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    folder = Path(snakemake.output[0]).parent
    base = read_base(Path(snakemake.input.base))
    serving = build_serving(parse(snakemake.config), base, folder, report)
    report(f"image: {serving.file or serving.image} (used where container.image is not set)")
