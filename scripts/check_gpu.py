"""Can the workers use their GPUs? Writes `results/checks/gpu.json`; says so when none is needed."""

from pathlib import Path

from serving.config import parse
from serving.deploy.checks import conclude, judge
from serving.deploy.checks_gpu import judge_gpu, not_needed, observe
from serving.deploy.checks_host import weight_bytes
from serving.deploy.fingerprint import resolve_device
from serving.deploy.placement import existing_gpus, place, usable_gpus
from serving.deploy.rule_script import telling
from serving.deploy.topology import roles

with telling(snakemake.log[0]) as say:
    config = parse(snakemake.config)
    device = resolve_device(config)
    if device == "cuda":
        topology = config.deployment.topology
        gpus = usable_gpus(config.workers.gpus, existing_gpus())
        placed = [
            place(role, index, gpus)
            for role in roles(topology)
            for index in range(getattr(config.workers, role))
        ]
        findings = judge_gpu(placed, weight_bytes(config), observe(sorted(set(placed))))
    else:
        findings = not_needed(device)
    conclude(judge("check_gpu", findings), Path(snakemake.output[0]), say=say)
