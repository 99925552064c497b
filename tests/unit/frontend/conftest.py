"""A frontend over a fake pipeline: in process, and on a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from serving.frontend.api.responses.store import ResponseStore
from serving.frontend.api.state import AppState
from serving.frontend.app import create_app
from serving.frontend.http.limits import InFlight
from serving.frontend.metrics.registry import Metrics
from serving.frontend.served.model import ServedModel, ServedModels
from starlette.applications import Starlette
from tokenizers import Tokenizer
from unit.frontend.fakes import MODEL, FakePipeline, make_card, write_tokenizer
from waiting import until


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipeline(tokenizer_dir: Path) -> FakePipeline:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    fake = FakePipeline(make_card(tokenizer_dir), tokenizer)
    fake.say("hello world, the fox")
    return fake


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def responses(tmp_path: Path) -> Iterator[ResponseStore]:
    store = ResponseStore(tmp_path / "responses.sqlite", 1024 * 1024, 3600.0)
    yield store
    store.close()


@pytest.fixture
async def state(
    pipeline: FakePipeline, metrics: Metrics, responses: ResponseStore
) -> AsyncIterator[AppState]:
    scripted: Any = pipeline
    served = ServedModel(
        name=MODEL, pipeline=scripted, metrics=metrics, in_flight=InFlight(8, metrics.in_flight)
    )
    state = AppState(
        models=ServedModels([served]),
        max_body_bytes=64 * 1024,
        launch_id="launch-1",
        responses=responses,
    )
    yield state
    await state.models.close()


@pytest.fixture
def app(state: AppState) -> Starlette:
    return create_app(state)


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def url(app: Starlette) -> AsyncIterator[str]:
    """The address of a real server in this event loop."""
    async with listening(app) as address:
        yield address


@pytest.fixture
async def impatient_url(state: AppState) -> AsyncIterator[str]:
    """The address of a server that gives clients little time."""
    app = create_app(msgspec.structs.replace(state, body_timeout_s=0.05, stall_s=0.05))
    async with listening(app) as address:
        yield address


@asynccontextmanager
async def listening(app: Starlette) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    # Small kernel buffers, so that a slow client is felt after kilobytes, not megabytes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    server = uvicorn.Server(
        uvicorn.Config(app, http="httptools", ws="none", access_log=False, log_config=None)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await serving
    listener.close()
