"""`python -m serving.frontend FILE`: serve the API until SIGTERM or SIGINT.

With `frontend.processes` above one, it only starts that many processes (`process_group.py`). Each
of them gets its process slot as a second argument.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from serving.config import FrontendConfig
from serving.config.process import (
    FrontendSettings,
    announce_ready,
    beating,
    collect_rarely,
    read_settings,
)
from serving.errors import OperatorError
from serving.frontend.api.responses.store import ResponseStore
from serving.frontend.api.state import AppState
from serving.frontend.app import create_app, lifespan
from serving.frontend.http.api_keys import ApiKeys, read_keys
from serving.frontend.http.browsers import with_browser_rules
from serving.frontend.http.protocol import LimitedHttpProtocol
from serving.frontend.log import set_up
from serving.frontend.process_group import STARTED, ProcessSlot, run_group

log = logging.getLogger("serving.frontend")


async def run(settings: FrontendSettings, slot: ProcessSlot | None) -> None:
    """Serve until SIGTERM or SIGINT; uvicorn handles both and drains."""
    ready_file = settings.ready_file if slot is None else settings.beat_file(slot.number)
    async with beating(ready_file), lifespan(settings, slot) as models:
        state = AppState(
            models=models,
            max_body_bytes=settings.frontend.max_body_bytes,
            responses=_response_store(settings.frontend),
            launch_id=os.environ.get("LAUNCH_ID", ""),
            slot=slot,
        )
        app: ASGIApp = create_app(state)
        if settings.frontend.api_keys_file is not None:
            keys = read_keys(settings.frontend.api_keys_file)
            app = ApiKeys(app, keys, settings.frontend.requests_per_minute)
        app = with_browser_rules(
            app,
            origins=settings.frontend.cors_origins,
            allowed_hosts=_known_hosts(settings.frontend),
        )
        await _listen(app, settings, slot)
    log.info("stopped")


def _response_store(config: FrontendConfig) -> ResponseStore:
    return ResponseStore(
        Path("run/responses.sqlite"), config.responses_store_bytes, config.responses_store_s
    )


def _known_hosts(config: FrontendConfig) -> list[str] | None:
    """Host names that requests may use. Where there are API keys, they keep strangers out."""
    if config.api_keys_file is not None:
        return None
    return [config.host, *config.allowed_hosts]


async def _listen(app: ASGIApp, settings: FrontendSettings, slot: ProcessSlot | None) -> None:
    frontend = settings.frontend
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=frontend.host,
            port=frontend.port,
            http=LimitedHttpProtocol,
            ws="none",
            access_log=False,
            log_config=None,
            ssl_certfile=frontend.tls_cert_file,
            ssl_keyfile=frontend.tls_key_file,
            server_header=False,
            proxy_headers=False,  # Nothing here reads the client's address.
            timeout_graceful_shutdown=max(1, round(frontend.drain_s)),
        )
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises each signal again when it has drained, for the handlers before its own.
        signal.signal(signum, lambda *_: None)
    sockets = None if slot is None else slot.sockets()
    serving = asyncio.create_task(server.serve(sockets), name="http")
    # uvicorn offers a flag and no event.
    while not server.started and not serving.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if server.started:
        collect_rarely()
        if slot is None:
            announce_ready(settings.ready_file, port=frontend.port)
        else:
            os.write(sys.stdout.fileno(), STARTED)
        log.info("listening on %s:%d", frontend.host, frontend.port)
    await serving


def main() -> None:
    settings = read_settings(sys.argv[1], FrontendSettings)
    slot = msgspec.json.decode(sys.argv[2], type=ProcessSlot) if len(sys.argv) > 2 else None
    set_up("frontend" if slot is None else f"frontend-{slot.number}")
    try:
        if slot is not None:
            slot.end_with_parent()
            uvloop.run(run(settings, slot))
        elif settings.frontend.processes > 1:
            uvloop.run(run_group(settings, sys.argv[1]))
        else:
            uvloop.run(run(settings, None))
    except* OperatorError as group:  # A task group wraps what is raised in it.
        for exc in group.exceptions:
            log.critical("%s", exc)  # `deploy.launch` looks for this line.
        sys.exit(1)


if __name__ == "__main__":
    main()
