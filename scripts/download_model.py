"""Bring the configured model onto this machine. Output: model.json, beside the files."""

import os
from pathlib import Path

from serving.config import parse
from serving.deploy.model.prepare import fetch_model
from serving.deploy.planning.fingerprint import resolve_source
from serving.deploy.rule_script import reporting

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    if resolve_source(config.model) != "hub":
        os.environ["HF_HUB_OFFLINE"] = "1"
    out_dir = Path(snakemake.output[0]).parent
    fetch_model(config.model, out_dir, weights=config.engine.weights, report=report)
