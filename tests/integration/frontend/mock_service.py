"""A service of mock workers as plain processes, with etcd and NATS of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.load.running_service import RunningService
from integration.tiny_model import save_tiny_model
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.torch.build import build_engine


def make_service(folder: Path, num_instances: int | None = None, **sections: Any) -> RunningService:
    model = save_tiny_model(folder / "tiny")
    fetched = fetch_model(
        ModelConfig(id=str(model)), folder / "model", weights="dummy", report=print
    )
    engine = EngineConfig(backend="mock", device="cpu", dtype="float32", weights="dummy")
    build_engine(fetched, folder / "engine", engine=engine, fingerprint="test", report=print)
    defaults: dict[str, Any] = {
        "model": {"id": str(model), "name": "tiny"},
        "engine": {"backend": "mock", "max_model_len": 1024, "kv_cache_tokens": 8192},
        "mock": {"zero_delay": True},
        "frontend": {"processes": 2},
        "workers": {"agg": 1, "instances_per_process": num_instances or 1},
    }
    return RunningService(
        folder / "service",
        folder / "engine",
        "agg_router",
        defaults | sections,
        device="cpu",
        dtype="float32",
        gpus=[],
        num_instances=num_instances,
    )
