"""The engine that a worker was told to serve, not started yet, and its model's card."""

from __future__ import annotations

from pathlib import Path

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.engine.manifest import EngineManifest, check_max_model_len, load_manifest
from serving.errors import OperatorError
from serving.protocol import ModelCard


def load_engine(process: WorkerSettings) -> tuple[BlockEngine | TransferringEngine, ModelCard]:
    """Raises OperatorError when the built engine is not the one that is meant."""
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

    config = process.engine
    return TorchEngine(
        Path(process.engine_dir),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        kv_cache_tokens=config.kv_cache_tokens,
        max_batch_size=config.max_batch_size,
        max_num_batched_tokens=config.step_tokens(process.device, process.role),
        max_waiting=config.max_waiting,
        device=process.device,
        dtype=process.dtype,
        kv_cache_dtype=config.kv_cache_dtype,
        host_cache_bytes=config.host_cache_bytes,
        num_threads=config.num_threads,
        gpu_memory_fraction=config.gpu_memory_fraction,
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
        role=process.role,
        instance_id=process.instance_id,
        engine=process.engine,
        timing=process.mock,
    )
