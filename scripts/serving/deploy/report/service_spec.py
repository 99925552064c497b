"""What the running service should be: its address, shape and limits, for commands that test it.

The settings files of the running programs (`run/*.json`) take precedence over the config, so a
command in a second shell needs no flags.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import Config, connect_address
from serving.config.process import FrontendSettings, WorkerSettings, read_settings
from serving.deploy.security.api_access import (
    authorization_headers,
    url_scheme,
    with_certificate_files,
)
from serving.errors import OperatorError


class ServiceSpec(Struct, frozen=True, kw_only=True):
    """`exact`: the dtype is float32, so equal prompts give equal greedy text."""

    url: str
    headers: dict[str, str] = {}
    tls_cert_file: str | None = None
    disaggregated: bool
    transport: str
    block_size: int
    exact: bool


def read_service_spec(run_dir: Path, config: Config) -> ServiceSpec:
    """From the settings files in `run_dir`, or from the config for programs never started."""
    frontend, workers = read_running_settings(run_dir)
    listen = frontend.frontend if frontend else config.frontend
    engine = workers[0].engine if workers else config.engine
    transfer = workers[0].kv_transfer if workers else config.kv_transfer
    topology = frontend.topology if frontend else config.deployment.topology
    dtype = workers[0].dtype if workers else config.engine.dtype
    return ServiceSpec(
        url=f"{url_scheme(listen)}://{connect_address(listen.host, listen.port)}",
        headers=authorization_headers(listen),
        tls_cert_file=with_certificate_files(listen).tls_cert_file,
        disaggregated=topology.startswith("disagg"),
        transport="mock" if engine.backend == "mock" else transfer.transport,
        block_size=engine.block_size,
        exact=dtype == "float32",
    )


def read_running_settings(run_dir: Path) -> tuple[FrontendSettings | None, list[WorkerSettings]]:
    """The settings of the programs that were last started here, if any.

    A file that another version of this project wrote counts as missing.
    """
    frontend, workers = None, []
    for path in sorted(run_dir.glob("*.json")):
        try:
            if path.stem == "frontend":
                frontend = read_settings(path, FrontendSettings)
            elif path.stem.startswith("worker-"):
                workers.append(read_settings(path, WorkerSettings))
        except (OSError, msgspec.MsgspecError):
            continue
    return frontend, workers


def tokenizer_dir(run_dir: Path) -> Path:
    """The tokenizer of the served model. Raises OperatorError when no worker was started."""
    _, workers = read_running_settings(run_dir)
    if not workers:
        raise OperatorError(
            "no worker was started here",
            remedy="start a service, for example `snakemake serve_agg_router`, then run this again",
        )
    return Path(workers[0].engine_dir)
