"""Frontends with routers of their own, workers, and messages that take time between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from msgspec import Struct

from serving.config import RouterConfig
from serving.engine.core.speed import WorkerSpeed
from serving.kv_router.peers import RoutingDecision
from serving.kv_router.router import KvRouter, PromptHashes, Route
from serving.load_report import LoadReport
from serving.protocol import KvEventBatch, ModelCard, Role
from serving.simulate.clock import Clock
from serving.simulate.outcome import RequestOutcome, SimulationOutcome
from serving.simulate.trace import Trace, TraceRequest
from serving.simulate.worker import SimulatedWorker, WorkerRequest

SALT = "simulated"


class ClusterShape(Struct, frozen=True):
    """What to simulate: workers of each role, blocks in each, frontends.

    `agg` workers do both phases; else there are `prefill` and `decode` workers. Delays in seconds:
    of events on their way, and of requests and tokens on theirs. Frontends that `share` see each
    other's decisions at once, as processes of one machine do.
    """

    num_blocks: int
    agg: int = 0
    prefill: int = 0
    decode: int = 0
    frontends: int = 1
    speed: WorkerSpeed = WorkerSpeed()
    event_delay_s: float = 0.002
    rpc_delay_s: float = 0.0005
    share: bool = True
    seed: int = 0


MakeRouter = Callable[[RouterConfig, Random, Clock], KvRouter]


def make_router(config: RouterConfig, rng: Random, clock: Clock) -> KvRouter:
    """The router that serves."""
    return KvRouter(config, rng=rng, clock=clock)


def simulate(
    trace: Trace,
    shape: ClusterShape,
    config: RouterConfig,
    *,
    make_router: MakeRouter = make_router,
    on_time: Callable[[float], None] | None = None,
) -> SimulationOutcome:
    """Run a trace to its end. `on_time` is called with each arrival."""
    return _Cluster(trace, shape, config, make_router).run(on_time)


class _Cluster:
    def __init__(
        self, trace: Trace, shape: ClusterShape, config: RouterConfig, make_router: MakeRouter
    ) -> None:
        self._trace, self._shape = trace, shape
        self._clock = clock = Clock()
        self._rng = Random(shape.seed)
        self._outcomes: list[RequestOutcome] = []
        self._left = len(trace.requests)
        card = ModelCard("simulated", "", 1 << 40, trace.block_size, SALT, "", 0)
        self._routers = [
            make_router(config, Random(shape.seed * 1000 + number), clock)
            for number in range(shape.frontends)
        ]
        counts: dict[Role, int] = {
            "agg": shape.agg,
            "prefill": shape.prefill,
            "decode": shape.decode,
        }
        self._workers = {
            f"{role}-{number}": SimulatedWorker(
                clock,
                f"{role}-{number}",
                role,
                card,
                shape.num_blocks,
                shape.speed,
                publish_kv=self._publish_kv,
                publish_load=self._publish_load,
            )
            for role, count in counts.items()
            for number in range(count)
        }
        self._decisions: list[tuple[int, RoutingDecision]] = []
        for number, router in enumerate(self._routers):
            for worker in self._workers.values():
                router.add_instance(worker.info)
                router.on_snapshot(worker.info.instance_id, 1, 0, [])
            if shape.frontends > 1 and shape.share:
                router.peers = _PeerRouters(self._decisions, number)

    def run(self, on_time: Callable[[float], None] | None) -> SimulationOutcome:
        for number, request in enumerate(self._trace.requests):
            router = self._routers[self._rng.randrange(len(self._routers))]
            arrive = partial(self._arrive, router, request, f"r{number}", on_time)
            self._clock.at(request.arrival_s, arrive)
        self._clock.run()
        busy_s = {name: worker.busy_s for name, worker in self._workers.items()}
        outcome = SimulationOutcome(self._outcomes, busy_s)
        for router in self._routers:
            outcome.evicted_blocks += router.evicted_blocks
            for name, worker in self._workers.items() if router.uses_index else ():
                known, held = router.indexed(name), worker.pool.stored_hashes()
                outcome.claimed_blocks += len(known - held)
                outcome.missing_blocks += len(held - known)
        return outcome

    # --- requests -------------------------------------------------------------------------------

    def _arrive(
        self,
        router: KvRouter,
        request: TraceRequest,
        request_id: str,
        on_time: Callable[[float], None] | None,
    ) -> None:
        if on_time is not None:
            on_time(self._clock.now_s)
        prompt = PromptHashes(request.prompt_tokens, request.block_hashes)
        outcome = RequestOutcome(request.prompt_tokens, 0, 0, 0.0, 0.0)
        if self._shape.agg:
            route = router.route(prompt, "agg", request_id=request_id)
        elif local := router.route_local(prompt, request_id=request_id):
            route, outcome.was_local = local, True
        else:
            route = router.route(prompt, "prefill", request_id=request_id)
        outcome.predicted_tokens = route.overlap_tokens
        worker = self._workers[route.instance_id]

        def prefilled() -> None:
            outcome.ttft_s = self._clock.now_s + self._shape.rpc_delay_s - request.arrival_s
            outcome.cached_tokens = computed.cached_tokens
            self._later(route.first_output)
            if computed.phase == "prefill":
                self._later(
                    lambda: self._hand_over(router, request, request_id, outcome, worker, computed)
                )
                self._later(lambda: _leave(route))

        def done() -> None:
            self._finish(outcome, request)
            self._later(lambda: _leave(route))

        computed = WorkerRequest(
            request_id,
            request,
            "prefill" if route.role == "prefill" else "agg",
            on_prefilled=prefilled,
            on_done=done,
        )
        self._later(lambda: worker.submit(computed))

    def _hand_over(
        self,
        router: KvRouter,
        request: TraceRequest,
        request_id: str,
        outcome: RequestOutcome,
        source: SimulatedWorker,
        prefilled: WorkerRequest,
    ) -> None:
        if request.completion_tokens == 1:
            source.release(prefilled)
            self._finish(outcome, request)
            return
        prompt = PromptHashes(request.prompt_tokens, request.block_hashes)
        route = router.route(prompt, "decode", request_id=request_id)

        def done() -> None:
            self._finish(outcome, request)
            self._later(lambda: _leave(route))

        fetched = WorkerRequest(
            request_id,
            request,
            "decode",
            on_prefilled=lambda: source.release(prefilled),
            on_done=done,
        )
        self._later(lambda: self._workers[route.instance_id].submit(fetched))

    def _finish(self, outcome: RequestOutcome, request: TraceRequest) -> None:
        took_s = self._clock.now_s + self._shape.rpc_delay_s - request.arrival_s - outcome.ttft_s
        outcome.itl_s = took_s / max(1, request.completion_tokens - 1)
        self._outcomes.append(outcome)
        self._left -= 1
        if not self._left:
            for worker in self._workers.values():
                worker.stop()

    # --- messages -------------------------------------------------------------------------------

    def _later(self, do: Callable[[], None]) -> None:
        self._clock.after(self._shape.rpc_delay_s, do)

    def _publish_kv(self, batch: KvEventBatch) -> None:
        self._clock.after(
            self._shape.event_delay_s, lambda: _tell(self._routers, KvRouter.on_kv, batch)
        )

    def _publish_load(self, report: LoadReport) -> None:
        self._clock.after(
            self._shape.event_delay_s, lambda: _tell(self._routers, KvRouter.on_load, report)
        )


class _PeerRouters:
    """The routers beside `number`. All of them append to one list of decisions."""

    def __init__(self, decisions: list[tuple[int, RoutingDecision]], number: int) -> None:
        self._decisions, self._number, self._read = decisions, number, 0

    def publish(self, decision: RoutingDecision) -> None:
        self._decisions.append((self._number, decision))

    def updates(self) -> list[RoutingDecision]:
        found = self._decisions[self._read :]
        self._read = len(self._decisions)
        return [decision for number, decision in found if number != self._number]


def _tell(routers: Sequence[KvRouter], method: Callable[..., object], message: object) -> None:
    for router in routers:
        method(router, message)


def _leave(route: Route) -> None:
    route.__exit__(None, None, None)
