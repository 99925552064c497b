"""The typed configuration: the keys of `config/config.yaml`, with defaults and meanings.

Each section has a class, in a file of its own or beside the sections it belongs with; its checks
are beside it. Everything else derives from these classes: the JSON schema, the tables of
`config/README.md` (`python -m serving.config.docs --write`), and the errors a person sees.

    parsing.py   `parse`: from the YAML to a checked `Config`, which is what the person wrote
    resolve.py   `ResolvedConfig`: what a `Config` means for one run on one machine
    process.py   the settings file of one started program
    docs.py      schema and reference page
"""

from __future__ import annotations

from serving.config.cluster import (
    ClusterConfig,
    NetworkConfig,
    SlurmConfig,
    connect_address,
    is_loopback,
)
from serving.config.control import EtcdConfig, NatsConfig
from serving.config.deployment import MULTINODE, ContainerConfig, DeploymentConfig, Topology
from serving.config.engine import EngineConfig, MockConfig, TensorRtLlmConfig, Weights
from serving.config.frontend import DeadlinesConfig, FrontendConfig
from serving.config.kv_transfer import KvTransferConfig
from serving.config.model import ModelConfig, TextOnly
from serving.config.parsing import Config, as_plain, nest, parse
from serving.config.resolve import ResolvedConfig
from serving.config.router import Policy, RouterConfig
from serving.config.workers import WorkersConfig
from serving.config.workload import BenchConfig, PlanConfig

__all__ = [
    "MULTINODE",
    "BenchConfig",
    "ClusterConfig",
    "Config",
    "ContainerConfig",
    "DeadlinesConfig",
    "DeploymentConfig",
    "EngineConfig",
    "EtcdConfig",
    "FrontendConfig",
    "KvTransferConfig",
    "MockConfig",
    "ModelConfig",
    "NatsConfig",
    "NetworkConfig",
    "PlanConfig",
    "Policy",
    "ResolvedConfig",
    "RouterConfig",
    "SlurmConfig",
    "TensorRtLlmConfig",
    "TextOnly",
    "Topology",
    "Weights",
    "WorkersConfig",
    "as_plain",
    "connect_address",
    "is_loopback",
    "nest",
    "parse",
]
