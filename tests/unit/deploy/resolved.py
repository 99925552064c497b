"""Resolved configurations for tests, without looking at the machine."""

from typing import Any

from serving.config import Config, ResolvedConfig, Topology, parse
from serving.config.resolve import Device, Dtype, resolved_config, with_topology
from serving.deploy.planning.plan import plan_deployment
from serving.deploy.planning.program import DeploymentPlan

CODE = {"worker": "w", "frontend": "f"}
FINGERPRINT = "e" * 16


def resolve_for_test(
    config: Config,
    topology: Topology | None = None,
    *,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    engine_fingerprint: str = FINGERPRINT,
) -> ResolvedConfig:
    return resolved_config(
        with_topology(config, topology or config.deployment.topology),
        device=device,
        dtype=dtype,
        engine_fingerprint=engine_fingerprint,
        model_key="model",
    )


def plan_for_test(
    config: Config | dict[str, Any], topology: Topology | None = None, **changes: Any
) -> DeploymentPlan:
    """The plan of `config` on a machine without GPUs."""
    written = config if isinstance(config, Config) else parse(config)
    resolved = resolve_for_test(written, topology, **changes)
    return plan_deployment(resolved, gpus=[], code=CODE)
