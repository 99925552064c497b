"""Makes the engine that a worker serves, not started yet, and its model's card."""

from __future__ import annotations

from pathlib import Path

import msgspec

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.engine.manifest import EngineManifest, check_max_model_len, load_manifest
from serving.errors import OperatorError
from serving.protocol import ModelCard


def load_engine(process: WorkerSettings) -> tuple[BlockEngine | TransferringEngine, ModelCard]:
    """Raises OperatorError when the built engine is not the one that the settings name."""
    manifest = load_manifest(Path(process.engine_dir))
    if manifest.fingerprint != process.engine_fingerprint:
        raise OperatorError(
            f"{process.engine_dir} was built as {manifest.fingerprint}, "
            f"not {process.engine_fingerprint}",
            remedy="run the serve target again: it rebuilds the engine",
        )
    config = process.engine
    check_max_model_len(config.max_model_len, manifest.model_max_len, manifest.model_id)
    card = ModelCard(
        name=process.model_name,
        tokenizer_dir=str(Path(process.engine_dir).resolve()),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        hash_salt=manifest.hash_salt,
        engine_fingerprint=manifest.fingerprint,
        created=int(manifest.created),
        dummy_weights=manifest.dummy_weights is not None,
    )
    if config.backend == "tensorrt_llm":
        return _tensorrt_llm(process, manifest), card
    if config.backend == "mock":
        return _mock(process, manifest), card
    return _torch(process, manifest), card


def _torch(process: WorkerSettings, manifest: EngineManifest) -> BlockEngine:
    from serving.engine.torch.engine import TorchEngine

    return TorchEngine(
        Path(process.engine_dir),
        msgspec.structs.replace(process.engine, dtype=process.dtype),
        process.device,
        role=process.role,
        hash_salt=manifest.hash_salt,
        fingerprint=manifest.fingerprint,
    )


def _tensorrt_llm(process: WorkerSettings, manifest: EngineManifest) -> TransferringEngine:
    from serving.engine.trtllm.engine import TensorRtLlmEngine

    return TensorRtLlmEngine(
        Path(process.engine_dir),
        manifest,
        role=process.role,
        instance_id=process.instance_id,
        engine=process.engine,
    )


def _mock(process: WorkerSettings, manifest: EngineManifest) -> TransferringEngine:
    from serving.engine.mock.engine import MockEngine

    assert process.mock is not None, "whoever wrote the file knew the engine"
    return MockEngine(
        Path(process.engine_dir),
        manifest,
        process.engine,
        role=process.role,
        instance_id=process.instance_id,
        timing=process.mock,
    )
