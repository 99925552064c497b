"""CPU of a streamed token in the frontend: of text, of text where tools are offered, of a call.

    python tests/benchmarks/answer_parts.py [--rounds N]

The application runs in this process over a scripted pipeline, so that nothing but the frontend's
own work is measured: detokenizing, parsing, writing events. In turns; medians; one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from serving.frontend.api.state import AppState  # noqa: E402
from serving.frontend.app import create_app  # noqa: E402
from serving.frontend.http.limits import InFlight  # noqa: E402
from serving.frontend.metrics.registry import Metrics  # noqa: E402
from serving.frontend.served.model import ServedModel, ServedModels  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from unit.frontend.fakes import (  # noqa: E402
    MODEL,
    TOOL_TEMPLATE,
    FakePipeline,
    make_card,
    write_tokenizer,
)

WORDS = "hello world the quick brown fox "
CALL = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


async def cpu_per_token(app: Any, pipeline: FakePipeline, text: str, tools: Any) -> float:
    """Microseconds."""
    pipeline.say(text)
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            **({"tools": tools} if tools else {}),
        }
    ).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
    began = time.process_time()
    await app({**scope, "headers": [], "http_version": "1.1"}, receive, send)
    return (time.process_time() - began) / len(pipeline.token_ids) * 1e6


async def measure(rounds: int, folder: Path) -> dict[str, float]:
    write_tokenizer(folder, TOOL_TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pipeline: Any = FakePipeline(make_card(folder, max_model_len=100_000), tokenizer)
    metrics = Metrics()
    served = ServedModel(
        name=MODEL, pipeline=pipeline, metrics=metrics, in_flight=InFlight(8, metrics.in_flight)
    )
    app = create_app(
        AppState(
            models=ServedModels([served]),
            max_body_bytes=10**6,
        )
    )
    rows = {
        "text": (WORDS * 42, None),
        "text, tools offered": (WORDS * 42, TOOLS),
        "tool call": (CALL % json.dumps({"text": WORDS * 40}), TOOLS),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds + 3):
        for name, (text, tools) in rows.items():
            times[name].append(await cpu_per_token(app, pipeline, text, tools))
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(args.rounds, Path(folder)))
    text = measured["text"]
    for name, cpu_us in measured.items():
        row = {"name": f"cpu per token: {name}", "us": round(cpu_us, 2)}
        print(json.dumps({**row, "ratio": round(cpu_us / text, 3), "goal": 1.3}))


if __name__ == "__main__":
    main()
