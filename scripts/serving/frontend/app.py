"""The frontend's HTTP application: its routes, and what lives as long as it does.

`lifespan` connects to etcd, NATS and the workers and gives the served models. `create_app` puts
the routes before it. What each route does is in `api/`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config.process import FrontendSettings
from serving.discovery import Discovery
from serving.events import EventPlane
from serving.frontend.api import completions
from serving.frontend.api.chat import api as chat
from serving.frontend.api.embeddings import embedding_routes
from serving.frontend.api.errors import routing_error, to_api_error
from serving.frontend.api.messages import api as messages
from serving.frontend.api.messages.api import messages_routes
from serving.frontend.api.models import model_routes
from serving.frontend.api.operations import operations_routes
from serving.frontend.api.responses.api import responses_api, responses_routes
from serving.frontend.api.state import AppState
from serving.frontend.api.tokens import token_routes
from serving.frontend.decision_log import DecisionLog
from serving.frontend.http.call import CompletionRoute
from serving.frontend.http.limits import InFlight
from serving.frontend.http.replies import error_response
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.metrics.restarts import RestartMetrics
from serving.frontend.metrics.router import EventPlaneMetrics, RouterMetrics
from serving.frontend.model import ModelLoader
from serving.frontend.pipeline import Pipeline
from serving.frontend.process_group import ProcessSlot
from serving.frontend.served.membership import InstancesOfModels
from serving.frontend.served.model import ServedModel, ServedModels
from serving.kv_router.router import KvRouter
from serving.rpc.handshake import read_secret


def create_app(state: AppState) -> Starlette:
    """All routes. Completions are plain ASGI, everything else is Starlette's."""
    completion_routes: dict[str, ASGIApp] = {
        "/v1/chat/completions": CompletionRoute(chat.API, state),
        "/v1/completions": CompletionRoute(completions.API, state),
        "/v1/responses": CompletionRoute(responses_api(state.responses), state),
        "/v1/messages": CompletionRoute(messages.API, state),
    }
    return _App(
        completion_routes,
        routes=[
            *(Route(path, route, methods=["POST"]) for path, route in completion_routes.items()),
            *model_routes(state),
            *responses_routes(state.responses),
            *messages_routes(state),
            *token_routes(state),
            *embedding_routes(state),
            *operations_routes(state),
        ],
        exception_handlers={HTTPException: _on_routing_error, Exception: _on_failure},
    )


@asynccontextmanager
async def lifespan(
    settings: FrontendSettings, slot: ProcessSlot | None
) -> AsyncIterator[ServedModels]:
    """The models, connected to the workers that register. Raises OperatorError."""
    control, of_models = settings.control, settings.per_model()
    is_alone = len(of_models) == 1
    metrics = Metrics(of_model=is_alone)
    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(control.nats_url, control.namespace, Path(control.nats_token_file))
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        served: list[ServedModel] = []
        by_model: dict[str, Instances] = {}
        for number, own in enumerate(of_models):
            own_metrics = metrics if is_alone else Metrics(of_process=False)
            router = KvRouter(own.router, model=own.model_name, rng=random.Random())
            if slot is not None:
                num_processes = len(slot.own_ports)
                router.peers = DecisionLog(slot.decision_log, slot.number, num_processes, number)
            instances = by_model[own.model_name] = Instances(
                router,
                events,
                tasks,
                own_metrics,
                secret=read_secret(control.rpc_secret_file),
                tokenizer_dir=own.engine_dir,
            )
            own_metrics.add(RouterMetrics(router))
            served.append(_served_model(own, router, instances, own_metrics))
        members = InstancesOfModels(by_model)
        # Each engine step reports; with one model, nothing needs to be looked up.
        reported = instances if is_alone else members
        events.on_reconnect = members.on_reconnect
        await events.subscribe(reported.on_kv, reported.on_load)
        metrics.add(EventPlaneMetrics(events.counters))
        metrics.add(RestartMetrics())
        discovery = await stack.enter_async_context(Discovery.from_settings(control))
        forever = [
            tasks.create_task(each.synchronise_forever(), name="synchronise")
            for each in by_model.values()
        ]
        watch = discovery.watch(members.up, members.down)
        forever.append(tasks.create_task(watch, name="watch"))
        models = ServedModels(served, metrics)
        stack.push_async_callback(models.close)
        for model in models:
            stack.push_async_callback(model.pipeline.close)
        yield models
        for task in forever:
            task.cancel()
        members.close()


def _served_model(
    settings: FrontendSettings, router: KvRouter, instances: Instances, metrics: Metrics
) -> ServedModel:
    return ServedModel(
        name=settings.model_name,
        aliases=tuple(settings.aliases),
        pipeline=Pipeline(settings, router, instances, metrics),
        metrics=metrics,
        in_flight=InFlight(settings.frontend.max_inflight, metrics.in_flight),
        loader=ModelLoader(settings.frontend),
    )


class _App(Starlette):
    """Passes completions straight to their routes, and everything else to Starlette.

    Starlette's middleware and its wrapping of `send` cost more than routing a request by its KV.
    """

    def __init__(self, completion_routes: dict[str, ASGIApp], **options: Any) -> None:
        super().__init__(**options)
        self._completion_routes = completion_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._completion_routes.get(scope["path"])
            if route is not None:
                await route(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


async def _on_routing_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    response = error_response(routing_error(exc.status_code, request.method, request.url.path))
    response.headers.update(exc.headers or {})  # Allow
    return response


async def _on_failure(request: Request, exc: Exception) -> Response:
    return error_response(to_api_error(exc))
