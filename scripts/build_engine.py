"""Build the engine of the downloaded model and check it. Input: model.json. Output: engine.json."""

import os
from pathlib import Path

# The libraries read these when they are imported: a build uses no network and draws no bars.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import msgspec
from serving.config.resolve import topology_roles
from serving.deploy.containers.library_runner import LibraryRunner
from serving.deploy.planning.gpu_assignment import existing_gpus, usable_gpus
from serving.deploy.rule_script import rule_script
from serving.engine.manifest import load_model
from serving.engine.torch.build import build_engine
from serving.engine.trtllm.build.engine_folder import build_engine as build_tensorrt_llm
from serving.engine.trtllm.build.target import Host
from serving.gpus import driver_version, installed_gpus

with rule_script(snakemake) as (config, report):
    engine = msgspec.structs.replace(config.engine, device=config.device, dtype=config.dtype)
    model = load_model(Path(snakemake.input.model))
    out_dir = Path(snakemake.output[0]).parent
    fingerprint = snakemake.params.fingerprint
    if engine.backend != "tensorrt_llm":
        build_engine(
            model,
            out_dir,
            engine=engine,
            fingerprint=fingerprint,
            report=report,
            text_only=config.model.text_only,
        )
    else:
        gpus, host = [], Host()
        if config.device == "cuda":
            gpus = usable_gpus(config.workers.gpus, existing_gpus(), engine.backend)
            used = [gpu for gpu in installed_gpus() or [] if gpu.index in gpus]
            host = Host(gpus=used, driver=driver_version())
        build_tensorrt_llm(
            model,
            out_dir,
            config=msgspec.structs.replace(config, engine=engine),
            roles=topology_roles(config.topology),
            fingerprint=fingerprint,
            run=LibraryRunner(
                config, gpus=gpus, writable=[out_dir.parent], readable=[Path(model.path)]
            ),
            host=host,
            report=report,
        )
