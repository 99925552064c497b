"""Bring the configured model onto this machine. Output: model.json, beside the files."""

import os
from pathlib import Path

from serving.deploy.model.prepare import fetch_model
from serving.deploy.planning.fingerprint import resolve_source
from serving.deploy.rule_script import rule_script

with rule_script(snakemake) as (config, report):
    if resolve_source(config.model) != "hub":
        os.environ["HF_HUB_OFFLINE"] = "1"
    out_dir = Path(snakemake.output[0]).parent
    fetch_model(config.model, out_dir, weights=config.engine.weights, report=report)
