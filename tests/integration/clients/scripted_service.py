"""The real frontend, on a real port, in front of a model that answers by a script.

An agent decides by itself to call a tool, which the bundled model is too small for. Behind the
script everything else is real: HTTP, the three protocols, the chat template, the tokenizer, the
parser of tool calls in Hermes' format.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from serving.frontend.api.responses.store import ResponseStore
from serving.frontend.api.state import AppState
from serving.frontend.app import create_app
from serving.frontend.http.limits import InFlight
from serving.frontend.metrics.registry import Metrics
from serving.frontend.served.model import ServedModel, ServedModels
from serving.protocol import EngineOutput
from serving.text.preprocess import PreparedRequest
from starlette.applications import Starlette
from tokenizers import Tokenizer
from unit.frontend.fakes import MODEL, TOOL_TEMPLATE, FakePipeline, make_card, write_tokenizer
from waiting import wait_until

MAX_MODEL_LEN = 1_000_000
"""In tokens of the script's tokenizer, which are short. Agents send up to 200 kB."""
ANSWER = "The work is finished."

Script = Callable[[str], str]
"""The rendered prompt to the text that the model generates."""


def call_then_answer(tool: str, arguments: dict[str, Any]) -> Script:
    """Calls `tool` where it is offered and has not been called, then says ANSWER.

    Requests without that tool are an agent's own side jobs, such as a title for the session.
    """
    call = json.dumps({"name": tool, "arguments": arguments})

    def script(prompt: str) -> str:
        if "<|im_start|>tool\n" in prompt:
            return ANSWER
        if f'"name": "{tool}"' not in prompt:
            return "A title"
        return f"I use a tool.\n<tool_call>\n{call}\n</tool_call>"

    return script


class ScriptedPipeline(FakePipeline):
    """Answers each request by `script` and keeps the prompts."""

    def __init__(self, folder: Path) -> None:
        write_tokenizer(folder, TOOL_TEMPLATE)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        super().__init__(make_card(folder, max_model_len=MAX_MODEL_LEN), tokenizer)
        self.script: Script = lambda _: ANSWER
        self.prompts: list[str] = []

    async def generate(self, prepared: PreparedRequest) -> AsyncIterator[EngineOutput]:
        prompt = self.tokenizer.decode(list(prepared.token_ids), skip_special_tokens=False)
        self.prompts.append(prompt)
        answer = FakePipeline(self.card, self.tokenizer)  # Agents ask several things at once.
        answer.say(self.script(prompt))
        async for output in answer.generate(prepared):
            yield output

    def tool_results(self) -> list[str]:
        """The results of tools, as the model saw them."""
        turns = [turn for prompt in self.prompts for turn in prompt.split("<|im_start|>")]
        return [turn.removeprefix("tool\n") for turn in turns if turn.startswith("tool\n")]


class ScriptedService:
    """Where the frontend listens, and the model behind it."""

    def __init__(self, url: str, pipeline: ScriptedPipeline) -> None:
        self.url, self.pipeline, self.model = url, pipeline, MODEL


@contextmanager
def scripted_service(folder: Path) -> Iterator[ScriptedService]:
    """Runs the frontend in a thread of its own until the end."""
    pipeline = ScriptedPipeline(folder / "model")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            _application(pipeline, folder / "responses.sqlite"),
            factory=True,
            http="httptools",
            ws="none",
            access_log=False,
            log_config=None,
        )
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        wait_until(lambda: server.started, what="the frontend listens")
        yield ScriptedService(f"http://127.0.0.1:{listener.getsockname()[1]}", pipeline)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
    assert not thread.is_alive()


def _application(pipeline: Any, database: Path) -> Callable[[], Starlette]:
    """Makes the application in the thread that runs it: SQLite binds a connection to its thread."""

    def make() -> Starlette:
        metrics = Metrics()
        in_flight = InFlight(64, metrics.in_flight)
        served = ServedModel(name=MODEL, pipeline=pipeline, metrics=metrics, in_flight=in_flight)
        state = AppState(
            models=ServedModels([served]),
            max_body_bytes=4 * 1024 * 1024,  # the default of `frontend.max_body_bytes`
            responses=ResponseStore(database, 16 * 1024 * 1024, 3600.0),
        )
        return create_app(state)

    return make
