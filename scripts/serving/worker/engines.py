"""Makes the engine that a worker serves, not started yet, and its model's card."""

from __future__ import annotations

from pathlib import Path

import msgspec

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.engine.manifest import EngineManifest, check_max_model_len, load_manifest
from serving.errors import OperatorError
from serving.protocol import ModelCard


def load_engine(settings: WorkerSettings) -> tuple[BlockEngine | TransferringEngine, ModelCard]:
    """Raises OperatorError when the built engine is not the one that the settings name."""
    manifest = load_manifest(Path(settings.engine_dir))
    if manifest.fingerprint != settings.engine_fingerprint:
        raise OperatorError(
            f"{settings.engine_dir} was built as {manifest.fingerprint}, "
            f"not {settings.engine_fingerprint}",
            remedy="run the serve target again: it rebuilds the engine",
        )
    config = settings.engine
    check_max_model_len(config.max_model_len, manifest.model_max_len, manifest.model_id)
    card = ModelCard(
        name=settings.model_name,
        tokenizer_dir=str(Path(settings.engine_dir).resolve()),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        hash_salt=manifest.hash_salt,
        engine_fingerprint=manifest.fingerprint,
        created=int(manifest.created),
        dummy_weights=manifest.dummy_weights is not None,
    )
    if config.backend == "tensorrt_llm":
        return _tensorrt_llm(settings, manifest), card
    if config.backend == "mock":
        return _mock(settings, manifest), card
    return _torch(settings, manifest), card


def _torch(settings: WorkerSettings, manifest: EngineManifest) -> BlockEngine:
    from serving.engine.torch.engine import TorchEngine

    return TorchEngine(
        Path(settings.engine_dir),
        msgspec.structs.replace(settings.engine, dtype=settings.dtype),
        settings.device,
        role=settings.role,
        hash_salt=manifest.hash_salt,
        fingerprint=manifest.fingerprint,
    )


def _tensorrt_llm(settings: WorkerSettings, manifest: EngineManifest) -> TransferringEngine:
    from serving.engine.trtllm.engine import TensorRtLlmEngine

    return TensorRtLlmEngine(
        Path(settings.engine_dir),
        manifest,
        role=settings.role,
        instance_id=settings.instance_id,
        engine=settings.engine,
    )


def _mock(settings: WorkerSettings, manifest: EngineManifest) -> TransferringEngine:
    from serving.engine.mock.engine import MockEngine

    assert settings.mock is not None, "the settings of a mock worker have a mock section"
    return MockEngine(
        Path(settings.engine_dir),
        manifest,
        settings.engine,
        role=settings.role,
        instance_id=settings.instance_id,
        timing=settings.mock,
    )
