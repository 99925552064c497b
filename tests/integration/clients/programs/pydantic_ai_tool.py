"""pydantic-ai: an agent that decides by itself to call a tool, and answers in text."""

from __future__ import annotations

from typing import Literal

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from weather import BASE_URL, MODEL, QUESTION, report
from weather import get_weather as weather_of

provider = OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none")
agent = Agent(OpenAIChatModel(MODEL, provider=provider))


@agent.tool_plain
def get_weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    return weather_of(city)


report(answer=agent.run_sync(QUESTION).output)
