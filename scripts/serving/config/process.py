"""The settings of one program: the JSON file named on its command line.

`deploy/planning/plan.py` derives these settings from the configuration; `python -m serving.worker
FILE` and `python -m serving.frontend FILE` read them. Paths are relative to the working directory,
which is the deployment's folder. There are no secrets in them, only names of files with secrets.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
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

BEAT_S = 1.0
ETCD_SERVER_NAME = "serving-etcd"
"""The name in the certificate of an etcd off loopback, whatever its address."""


class ControlServices(Struct, frozen=True, kw_only=True):
    """Where etcd and NATS are, and the credentials they ask for."""

    namespace: str
    etcd_endpoint: str  # host:port
    lease_s: int
    nats_url: str  # nats://host:port
    nats_token_file: str
    rpc_secret_file: str = ""  # empty: workers and frontends do not authenticate
    etcd_join_file: str = ""  # PEM for mutual TLS; empty: plain TCP on loopback


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """`run/worker-{role}-{index}.json`, and the settings of one instance of that worker.

    `gpus` are the indices that the worker computes on; empty on CPU. `engine_dir` holds engine.json;
    the worker refuses one with another fingerprint than `engine_fingerprint`. A step of the engine
    that is `hang_s` late ends the worker.
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
    hang_s: float = 30.0
    mock: MockConfig | None = None  # only for the mock engine
    num_instances: int = 1

    def instances(self) -> list[WorkerSettings]:
        """Settings for each instance that the process hosts. The first instance has the name of the
        process, the others are `{role}-{index}-{number}`, from 1."""
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


class FurtherModel(Struct, frozen=True, kw_only=True):
    """What a frontend needs to know of a model beside the first one."""

    model_name: str
    aliases: list[str] = []
    engine_dir: str = ""
    frontend: FrontendConfig


class FrontendSettings(Struct, frozen=True, kw_only=True):
    """`run/frontend.json`. `disaggregated`: a request needs a prefill and a decode worker."""

    topology: str
    disaggregated: bool
    model_name: str
    aliases: list[str] = []
    frontend: FrontendConfig
    router: RouterConfig
    deadlines: DeadlinesConfig
    control: ControlServices
    ready_file: str
    engine_dir: str = ""  # with the tokenizer; empty: from the workers' model card
    own_instances: list[str] | None = None  # on a head: the instances of this machine
    silent_s: float = 10.0  # a process of several that is silent for this long is replaced
    further_models: list[FurtherModel] = []

    def per_model(self) -> list[FrontendSettings]:
        """Settings for each model that the frontend serves; these here are of the first one."""
        own = [
            msgspec.structs.replace(self, **msgspec.structs.asdict(model))
            for model in self.further_models
        ]
        return [self, *own]

    def beat_file(self, number: int) -> Path:
        """What process `number` of several touches each second."""
        return Path(self.ready_file).with_name(f"frontend-{number}.ready")


Settings = TypeVar("Settings", WorkerSettings, FrontendSettings)


def read_settings(path: str | Path, kind: type[Settings]) -> Settings:
    """Raises OSError or msgspec.MsgspecError, for example for a file of another version."""
    return msgspec.json.decode(Path(path).read_bytes(), type=kind)


def announce_ready(path: str | Path, **facts: Any) -> None:
    """Report to the start script that this process (`LAUNCH_ID`) is ready, in one atomic write."""
    target = Path(path)
    content = {"launch_id": os.environ.get("LAUNCH_ID", ""), "pid": os.getpid(), **facts}
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(msgspec.json.encode(content))
    temporary.replace(target)


@asynccontextmanager
async def beating(ready_file: str | Path) -> AsyncIterator[None]:
    """Touch `ready_file` each second, once it is there, while the context lasts.

    The event loop that serves does it, so that its silence shows (`deploy/healing/`).
    """

    async def beat() -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            with suppress(OSError):  # not announced yet, or the disk is away
                os.utime(ready_file)

    task = asyncio.create_task(beat(), name="beat")
    try:
        yield
    finally:
        task.cancel()


def collect_rarely() -> None:
    """Make the garbage collector run rarely, in a process that is about to serve.

    A full collection visits every object and stalls all streams, for 0.2 s in a worker with torch.
    It would find little: objects that exist now stay, and requests leave no reference cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)
