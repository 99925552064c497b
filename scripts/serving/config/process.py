"""What one started program is told: the JSON file named on its command line.

`deploy/topology.py` writes these from the configuration; `python -m serving.worker FILE` and
`python -m serving.frontend FILE` read them. Paths are relative to the working directory, which
is the deployment's. Secrets are not in here: files name the files that hold them.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from serving.config import (
    DeadlinesConfig,
    EngineConfig,
    FrontendConfig,
    KvTransferConfig,
    MockConfig,
    RouterConfig,
)
from serving.protocol import Role

ETCD_SERVER_NAME = "serving-etcd"
"""Whom the certificate of an etcd off loopback names, wherever it is."""


class ControlServices(Struct, frozen=True, kw_only=True):
    """Where etcd and NATS are, and how to behave towards them."""

    namespace: str
    etcd_endpoint: str  # host:port
    lease_s: int
    nats_url: str  # nats://host:port
    nats_token_file: str
    rpc_secret_file: str = ""  # none: workers and frontends prove nothing to each other
    etcd_join_file: str = ""  # PEM for mutual TLS; none: plain, on loopback


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """`run/worker-{role}-{index}.json`, and one instance of that worker. `gpus` are the indices this worker computes on, none on CPU.

    `engine_dir` holds engine.json; a fingerprint other than `engine_fingerprint` is refused.
    """

    instance_id: str  # "{role}-{index}"
    role: Role
    model_name: str
    engine_dir: str
    engine_fingerprint: str
    engine: EngineConfig
    device: str
    dtype: str
    gpus: list[int]
    host: str  # for frontends
    kv_host: str  # for workers that fetch KV
    unix_socket: str
    ready_file: str
    control: ControlServices
    kv_transfer: KvTransferConfig
    drain_s: float
    mock: MockConfig | None = None  # only for the mock engine
    num_instances: int = 1

    def instances(self) -> list[WorkerSettings]:
        """One for each instance that the process hosts: the first is called as the process, the
        others `{role}-{index}-{number}`, from 1."""
        stem = self.unix_socket.removesuffix(".sock")
        own = [
            msgspec.structs.replace(
                self,
                instance_id=f"{self.instance_id}-{number}",
                unix_socket=f"{stem}-{number}.sock",
            )
            for number in range(1, self.num_instances)
        ]
        return [self, *own]


class FrontendSettings(Struct, frozen=True, kw_only=True):
    """`run/frontend.json`. `disaggregated` says which roles a request needs."""

    topology: str
    disaggregated: bool
    model_name: str
    aliases: list[str] = []
    frontend: FrontendConfig
    router: RouterConfig
    deadlines: DeadlinesConfig
    control: ControlServices
    ready_file: str
    engine_dir: str = ""  # where this machine has the tokenizer; none: where workers say
    own_instances: list[str] | None = None  # on a head: those of this machine


Settings = TypeVar("Settings", WorkerSettings, FrontendSettings)


def read_settings(path: str | Path, kind: type[Settings]) -> Settings:
    """Raises OSError or msgspec.ValidationError; the file is ours, so neither is expected."""
    return msgspec.json.decode(Path(path).read_bytes(), type=kind)


def announce_ready(path: str | Path, **facts: Any) -> None:
    """Tell the start script that this very process (`LAUNCH_ID`) is ready, in one atomic write."""
    target = Path(path)
    content = {"launch_id": os.environ.get("LAUNCH_ID", ""), "pid": os.getpid(), **facts}
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(msgspec.json.encode(content))
    temporary.replace(target)


def collect_rarely() -> None:
    """For a process that is about to serve: what is here now stays, and what requests leave is freed
    without the garbage collector, as it is in no cycle.

    A full collection looks at every object, for 0.2 s in a worker with torch, and stalls all streams.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)
