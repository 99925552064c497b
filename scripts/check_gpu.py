"""Can the workers use their GPUs? Writes `results/checks/gpu.json`; says so when none is needed."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks import conclude, judge
from serving.deploy.checks_gpu import (
    judge_gpu,
    judge_tensorrt_llm,
    library_line,
    not_needed,
    observe,
)
from serving.deploy.checks_host import weight_bytes
from serving.deploy.deployment import links
from serving.deploy.fingerprint import resolve_device, resolve_dtype
from serving.deploy.gpus import driver_version, installed_gpus
from serving.deploy.placement import existing_gpus, usable_gpus
from serving.deploy.rule_script import telling
from serving.deploy.topology import placed

with telling(snakemake.log[0]) as say:
    config = parse(snakemake.config)
    device = resolve_device(config)
    backend = config.engine.backend
    if device == "cuda":
        gpus = usable_gpus(config.workers.gpus, existing_gpus(), backend)
        places = list(placed(config, gpus, links(config, gpus)).values())
        if backend == "torch":
            own = [index for worker in places for index in worker]
            findings = judge_gpu(own, weight_bytes(config), observe(sorted(set(own))))
        else:
            findings = judge_tensorrt_llm(
                places,
                installed_gpus(),
                driver=driver_version(),
                version=library_line(config),
                dtype=resolve_dtype(config),
                weights=weight_bytes(config),
            )
    else:
        findings = not_needed(device)
    conclude(judge("check_gpu", findings), Path(snakemake.output[0]), say=say)
