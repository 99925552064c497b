"""Can the workers use their GPUs? Writes `results/checks/gpu.json`; says so when none is needed."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.gpu import judge_gpu, not_needed, observe_torch
from serving.deploy.checks.host import weight_bytes
from serving.deploy.checks.tensorrt_llm import judge_tensorrt_llm, library_line
from serving.deploy.planning.deployment import links
from serving.deploy.planning.fingerprint import resolve_device, resolve_dtype
from serving.deploy.planning.placement import existing_gpus, usable_gpus
from serving.deploy.planning.topology import placed
from serving.deploy.rule_script import reporting
from serving.gpus import driver_version, installed_gpus

with reporting(snakemake.log[0]) as report:
    config = parse(snakemake.config)
    device = resolve_device(config)
    backend = config.engine.backend
    if device == "cuda":
        gpus = usable_gpus(config.workers.gpus, existing_gpus(), backend)
        places = list(placed(config, gpus, links(config, gpus)).values())
        if backend == "torch":
            own = [index for worker in places for index in worker]
            findings = judge_gpu(own, weight_bytes(config), observe_torch(sorted(set(own))))
        else:
            findings = judge_tensorrt_llm(
                places,
                installed_gpus() or [],
                driver=driver_version(),
                version=library_line(config),
                dtype=resolve_dtype(config),
                weights=weight_bytes(config),
            )
    else:
        findings = not_needed(device)
    conclude(judge("check_gpu", findings), Path(snakemake.output[0]), report=report)
