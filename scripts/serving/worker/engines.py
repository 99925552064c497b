"""Makes the engine that a worker serves, not started yet, and the card of its model."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, EngineSpec, TransferringEngine
from serving.engine.manifest import EngineManifest, check_max_model_len, load_manifest
from serving.errors import OperatorError
from serving.protocol import ModelCard

LOCAL_WORKERS = "SERVING_LOCAL_WORKERS"
"""Names how many workers share this machine's memory. It is no setting, because a worker that runs
need not restart when another one joins it."""


def load_engine(
    settings: WorkerSettings,
) -> tuple[BlockEngine | TransferringEngine, EngineManifest]:
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
    if config.backend == "tensorrt_llm":
        return _tensorrt_llm(settings, manifest), manifest
    if config.backend == "mock":
        return _mock(settings, manifest), manifest
    return _torch(settings, manifest), manifest


def model_card(settings: WorkerSettings, manifest: EngineManifest, spec: EngineSpec) -> ModelCard:
    """`spec` is that of the started engine, which knows the context that it can offer."""
    return ModelCard(
        name=settings.model_name,
        tokenizer_dir=str(Path(settings.engine_dir).resolve()),
        max_model_len=spec.max_model_len,
        block_size=spec.block_size,
        hash_salt=manifest.hash_salt,
        engine_fingerprint=manifest.fingerprint,
        created=int(manifest.created),
        dummy_weights=manifest.dummy_weights is not None,
        text_of=manifest.text_of,
    )


def _torch(settings: WorkerSettings, manifest: EngineManifest) -> BlockEngine:
    from serving.engine.torch.engine import TorchEngine

    return TorchEngine(
        Path(settings.engine_dir),
        msgspec.structs.replace(settings.engine, dtype=settings.dtype),
        settings.device,
        role=settings.role,
        hash_salt=manifest.hash_salt,
        fingerprint=manifest.fingerprint,
        num_local_workers=int(os.environ.get(LOCAL_WORKERS, "1")),
    )


def _tensorrt_llm(settings: WorkerSettings, manifest: EngineManifest) -> TransferringEngine:
    from serving.engine.trtllm.engine import TensorRtLlmEngine

    return TensorRtLlmEngine(
        Path(settings.engine_dir),
        manifest,
        role=settings.role,
        instance_id=settings.instance_id,
        engine=msgspec.structs.replace(
            settings.engine,
            max_model_len=settings.engine.context_tokens(
                manifest.max_model_len or manifest.model_max_len
            ),
        ),
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
