"""The production engine: TensorRT-LLM behind the `TransferringEngine` contract.

Its arguments are in `engine_dir/llm_args-{role}.yaml`. Requests go through it in `requests/`. Its
events and statistics are polled and translated in `reports/`. This module starts it, watches its
health and stops it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from serving import block_hash
from serving.config import EngineConfig
from serving.engine.base import EngineHealth, EngineSpec, StepSink, TransferringEngine
from serving.engine.manifest import EngineManifest
from serving.engine.trtllm.arguments import LlmArguments, read_arguments
from serving.engine.trtllm.environment import scrub_mpi_environment, set_transport_defaults
from serving.engine.trtllm.failures import explain_start
from serving.engine.trtllm.library import LoadedLibrary, load_library, load_llm
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.reports.kv_events import KvEventTranslator
from serving.engine.trtllm.reports.polling import drain, poll_forever
from serving.engine.trtllm.reports.stats import EngineStats, parse_stats
from serving.engine.trtllm.requests.context import RequestContext
from serving.engine.trtllm.requests.open_requests import OpenRequests
from serving.engine.trtllm.requests.sampling import Vocabulary
from serving.engine.trtllm.threads import in_thread
from serving.engine.trtllm.visible_gpus import check_gpus, visible_gpus
from serving.errors import EngineFailed, OperatorError
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import EngineRequest, Role, Tier

log = logging.getLogger(__name__)

FETCH_S = 60.0
"""The library's own default for `kv_transfer_timeout_ms`."""
CLOSE_S = 10.0
SHUTDOWN_S = 20.0
FIRST_STATS_S = 2.0


class Timeouts(Struct, frozen=True):
    """Seconds. The first generation, within `start_s`, may compile kernels and tune them. When
    requests run and no output comes for `health_s`, the library has `probe_s` for one token."""

    start_s: float = 600.0
    health_s: float = 30.0
    probe_s: float = 30.0


DEFAULT_TIMEOUTS = Timeouts()


class TensorRtLlmEngine(TransferringEngine):
    """One `LLM` of one role. See the contract; `manifest` is the engine's."""

    def __init__(
        self,
        engine_dir: Path,
        manifest: EngineManifest,
        *,
        role: Role,
        instance_id: str,
        engine: EngineConfig,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._timeouts = timeouts
        self._engine_dir, self._manifest = engine_dir, manifest
        self._role, self._instance_id, self._config = role, instance_id, engine
        self._vocabulary = Vocabulary(
            manifest.vocab_size, tuple(manifest.eos_token_ids), manifest.pad_token_id
        )
        self._translator = KvEventTranslator(engine.block_size, manifest.hash_salt)
        self._root = block_hash.root_hash(manifest.hash_salt)
        self._stats = EngineStats()
        self._are_stats_fresh = False
        self._is_broken = False
        self._tasks: list[asyncio.Task[None]] = []
        self._llm: Any = None
        self._library: LoadedLibrary
        self._outbox: Outbox
        self._requests: OpenRequests
        self._suspicion: asyncio.Event
        self.transfers = KvTransferTotals()

    # --- life ----------------------------------------------------------------------------------

    async def start(self, sink: StepSink) -> None:
        manifest, config = self._manifest, self._config
        filename = manifest.llm_args.get(self._role, f"llm_args-{self._role}.yaml")
        arguments = read_arguments(self._engine_dir, filename)
        transceiver = arguments.section("cache_transceiver_config")
        self.transfers.kv_transport = str(transceiver.get("backend") or "").lower()
        if removed := scrub_mpi_environment(os.environ):
            log.info("removed from the environment, for MPI spawn: %s", ", ".join(removed))
        set_transport_defaults(os.environ, self.transfers.kv_transport)

        started = time.monotonic()
        self._library, self._llm = await in_thread(lambda: self._load(arguments), "trtllm-load")
        self._suspicion = asyncio.Event()
        self._outbox = Outbox(sink, self.load)
        timeout_ms = transceiver.get("kv_transfer_timeout_ms")
        self._requests = OpenRequests(
            RequestContext(
                runtime=self._library.runtime(self._llm),
                outbox=self._outbox,
                instance_id=self._instance_id,
                limits=config,
                vocabulary=self._vocabulary,
                guide_backend=arguments.values.get("guided_decoding_backend"),
                fetch_s=timeout_ms / 1000 if timeout_ms else FETCH_S,
                transfers=self.transfers,
                num_cached=self._num_cached,
                suspect=self._suspicion.set,
            )
        )
        try:
            await self._prove(self._timeouts.start_s)
            await self._first_stats(arguments)
        except EngineFailed as exc:
            await self._shut_down()
            raise explain_start(exc) from exc
        except BaseException:
            await self._shut_down()
            raise
        self.spec = EngineSpec(
            max_model_len=config.resolved_context,
            block_size=config.block_size,
            num_blocks=self._num_blocks(),
            max_batch_size=config.max_batch_size,
            hash_salt=manifest.hash_salt,
            fingerprint=manifest.fingerprint,
            kv_layout=None,
            device=manifest.device,
        )
        self._tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("trtllm-events", self._poll("KV events", "get_kv_cache_events_async")),
                ("trtllm-stats", self._poll("statistics", "get_stats_async")),
                ("trtllm-health", self._watch()),
            )
        ]
        log.info(
            "TensorRT-LLM %s serves after %.0f s: %d blocks of %d tokens, KV over %s",
            self._library.version,
            time.monotonic() - started,
            self.spec.num_blocks,
            config.block_size,
            self.transfers.kv_transport or "nothing",
        )

    def _load(self, arguments: LlmArguments) -> tuple[LoadedLibrary, Any]:
        """Runs in a thread. Checks GPUs and versions first, since loading takes minutes."""
        manifest = self._manifest
        if manifest.device != "cpu":
            values = arguments.values
            sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
            num_gpus = 1
            for key in sizes:
                num_gpus *= int(values.get(key) or 1)
            gpus = visible_gpus()
            if gpus is not None:
                check_gpus(gpus, num_gpus, manifest.stamp)
        library = load_library()
        built_with = manifest.stamp.get("tensorrt_llm")
        if built_with is not None and built_with != str(library.version):
            raise OperatorError(
                f"{self._engine_dir} was built for TensorRT-LLM {built_with}, and "
                f"{library.version} is installed here",
                remedy="run the serve target again: it rebuilds the engine for this version",
            )
        return library, load_llm(library, arguments, manifest.flow)

    async def close(self) -> None:
        if self._llm is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_requests"):
            await self._requests.close(0.0 if self._is_broken else CLOSE_S)
            self._outbox.flush()
        await self._shut_down()

    async def _shut_down(self) -> None:
        llm, self._llm = self._llm, None
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await in_thread(llm.shutdown, "trtllm-shutdown")
        except TimeoutError:
            log.error("TensorRT-LLM did not shut down within %g s", SHUTDOWN_S)
        except Exception:
            log.exception("TensorRT-LLM's shutdown failed")

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        self._are_stats_fresh = False
        self._requests.submit(request)

    def abort(self, request_id: str) -> None:
        self._requests.abort(request_id)

    def health(self) -> EngineHealth:
        return EngineHealth("it generates nothing any more" if self._is_broken else "")

    def snapshot(self, tier: Tier = "device") -> list[int]:
        # Its events do not name the tier: a block can be reused from either.
        return list(self._outbox.delivered) if tier == "device" else []

    def load(self) -> LoadReport:
        """Requests by our own count, corrected by the length of the library's queue when it is fresh.

        Its statistics stop when it is idle, and the last ones still show the blocks of the last
        request. Without requests no block is in use.
        """
        num_requests, stats = len(self._requests), self._stats
        num_blocks = self._num_blocks()
        num_running = min(num_requests, self._config.max_batch_size)
        if self._are_stats_fresh and stats.num_queued is not None:
            num_running = max(0, min(num_running, num_requests - stats.num_queued))
        active = min(stats.num_used_blocks or 0, num_blocks) if num_requests else 0
        cached = min(len(self._outbox.delivered), num_blocks)
        return LoadReport(
            num_running=num_running,
            num_waiting=num_requests - num_running,
            queued_tokens=self._requests.context.queued_tokens,
            active_blocks=active,
            cached_blocks=max(0, cached - active),
            num_blocks=num_blocks,
        )

    def _num_cached(self, token_ids: list[int]) -> int:
        """An estimate from its events, for versions whose answers lack the number. The last token is
        always computed."""
        block_size, held = self._config.block_size, self._outbox.delivered
        hashes = block_hash.chain(token_ids[:-1], block_size, self._root)
        missing = next((i for i, known in enumerate(hashes) if known not in held), len(hashes))
        return missing * block_size

    # --- events and statistics -----------------------------------------------------------------

    async def _poll(self, what: str, method: str) -> None:
        take = self._take_event if what == "KV events" else self._take_stats
        await poll_forever(what, getattr(self._llm, method), take, lambda: len(self._requests) > 0)

    def _take_event(self, event: dict[str, Any]) -> None:
        self._outbox.put_events(self._translator.feed(event))

    def _take_stats(self, raw: dict[str, Any]) -> None:
        self._stats = parse_stats(raw, self._stats)
        self._are_stats_fresh = True

    async def _first_stats(self, arguments: LlmArguments) -> None:
        """Learn the number of blocks, and check their size.

        Raises OperatorError when blocks differ: routing hashes would name blocks that do not exist.
        """
        deadline = time.monotonic() + FIRST_STATS_S
        while self._stats.num_blocks is None and time.monotonic() < deadline:
            try:
                await drain(self._llm.get_kv_cache_events_async, self._take_event)
                await drain(self._llm.get_stats_async, self._take_stats)
            except Exception:
                log.exception("TensorRT-LLM's first statistics could not be read")
                break
            await asyncio.sleep(0.02)
        configured = arguments.section("kv_cache_config").get("tokens_per_block")
        tokens_per_block = self._stats.tokens_per_block or configured
        if tokens_per_block is not None and tokens_per_block != self._config.block_size:
            raise OperatorError(
                f"TensorRT-LLM {self._library.version} keeps KV in blocks of {tokens_per_block} "
                f"tokens, and `engine.block_size` is {self._config.block_size}",
                remedy=f"set engine.block_size to {tokens_per_block}",
            )

    def _num_blocks(self) -> int:
        by_level = self._translator.num_blocks_by_level
        if self._stats.num_blocks is not None:
            return self._stats.num_blocks
        if by_level:
            return by_level[0]
        config = self._config
        tokens = config.kv_cache_tokens or config.resolved_context * config.max_batch_size
        return tokens // config.block_size

    # --- health --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Probe the library when it is silent or suspect; a live process proves nothing."""
        while not self._is_broken:
            try:
                async with asyncio.timeout(self._timeouts.health_s):
                    await self._suspicion.wait()
            except TimeoutError:
                context = self._requests.context
                if context.has_output or not len(self._requests):
                    context.has_output = False
                    continue
            self._suspicion.clear()
            try:
                await self._prove(self._timeouts.probe_s)
            except EngineFailed as exc:
                log.error("%s; no more requests are accepted", exc)
                self._is_broken = True
                self._requests.fail_all(str(exc))

    async def _prove(self, within_s: float) -> None:
        """Generate one token. Raises EngineFailed."""
        token = next(iter(self._vocabulary.eos), 0)
        try:
            params = self._library.top.SamplingParams(
                max_tokens=1, top_k=1, end_id=-1, pad_id=0, ignore_eos=True, detokenize=False
            )
            async with asyncio.timeout(within_s):
                result = self._llm.generate_async(inputs=[token], sampling_params=params)
                await result
            num_tokens = len(result.outputs[0].token_ids)
        except TimeoutError:
            raise EngineFailed(f"TensorRT-LLM generated nothing within {within_s:g} s") from None
        except Exception as exc:
            raise EngineFailed(f"TensorRT-LLM failed: {type(exc).__name__}: {exc}") from exc
        if num_tokens == 0:
            raise EngineFailed("TensorRT-LLM generated no token when asked for one")
