"""pydantic-ai: its default way to structured output, which is a tool that must be called."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from weather import BASE_URL, MODEL, QUESTION, report


class City(BaseModel):
    name: Literal["Paris", "Oslo"]
    is_capital: bool


provider = OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none")
model = OpenAIChatModel(MODEL, provider=provider)
agent = Agent(
    model,
    output_type=City,
    instructions="Be short.",
    model_settings={"parallel_tool_calls": False, "temperature": 0.0},
)
report(parsed=agent.run_sync(QUESTION).output.name)
