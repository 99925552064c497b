"""Pack the downloaded model into an engine and check it. Input: model.json. Output: engine.json."""

import os
from pathlib import Path

# Read when the libraries are imported: a build never asks the network, and draws no bars.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import msgspec
from serving.config import parse
from serving.deploy.fingerprint import engine_fingerprint, resolve_device, resolve_dtype
from serving.deploy.rule_script import telling
from serving.engine.manifest import load_model
from serving.engine.torch.build import build_engine

with telling(snakemake.log[0]) as say:
    config = parse(snakemake.config)
    engine = msgspec.structs.replace(
        config.engine, device=resolve_device(config), dtype=resolve_dtype(config)
    )
    build_engine(
        load_model(Path(snakemake.input[0])),
        Path(snakemake.output[0]).parent,
        engine=engine,
        fingerprint=engine_fingerprint(config),
        progress=say,
    )
