"""What every client program shares: where the service is, a tool, and how a program reports."""

from __future__ import annotations

import json
import os
from typing import Any

BASE_URL = os.environ["SERVICE_URL"]
MODEL = os.environ["SERVICE_MODEL"]
QUESTION = "What is the weather in Paris?"
RESULT = "18 degrees and sunny"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
"""Of the tool's arguments. Short, so that a small model cannot go on for long."""

cities: list[str] = []
"""What the tool was called with."""


def get_weather(city: str) -> str:
    assert city in ("Paris", "Oslo"), city
    cities.append(city)
    return RESULT


def report(**facts: Any) -> None:
    """The last line that a program prints."""
    print(json.dumps({"cities": cities, **facts}))
