"""Can the workers use their GPUs? Writes `results/checks/gpu.json`, also when no GPU is needed."""

from pathlib import Path

from serving.deploy.checks.findings import conclude, judge
from serving.deploy.checks.gpu import judge_gpu, not_needed, observe_torch
from serving.deploy.checks.host import weight_bytes
from serving.deploy.checks.tensorrt_llm import judge_tensorrt_llm, library_line
from serving.deploy.planning.deployment import nvlinks_between
from serving.deploy.planning.gpu_assignment import assign_gpus, existing_gpus, usable_gpus
from serving.deploy.rule_script import rule_script
from serving.gpus import driver_version, installed_gpus

with rule_script(snakemake) as (config, report):
    backend = config.engine.backend
    if config.device == "cuda":
        gpus = usable_gpus(config.workers.gpus, existing_gpus(), backend)
        assigned = list(assign_gpus(config, gpus, nvlinks_between(config, gpus)).values())
        if backend == "torch":
            own = [index for worker in assigned for index in worker]
            findings = judge_gpu(own, weight_bytes(config), observe_torch(sorted(set(own))))
        else:
            findings = judge_tensorrt_llm(
                assigned,
                installed_gpus() or [],
                driver=driver_version(),
                version=library_line(config),
                dtype=config.dtype,
                weights=weight_bytes(config),
            )
    else:
        findings = not_needed(config.device)
    conclude(judge("check_gpu", findings), Path(snakemake.output[0]), report=report)
