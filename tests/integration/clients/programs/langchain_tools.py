"""langchain-openai: `bind_tools`, a stream, and structured output."""

from __future__ import annotations

from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from weather import BASE_URL, MODEL, QUESTION, report
from weather import get_weather as weather_of


@tool
def get_weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    return weather_of(city)


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Oslo"]


model = ChatOpenAI(
    base_url=f"{BASE_URL}/v1", api_key="none", model=MODEL, max_tokens=48, temperature=0
)
history: list = [HumanMessage(QUESTION)]
asked = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(
    history
)
[call] = asked.tool_calls
result = get_weather.invoke(call)
assert isinstance(result, ToolMessage)
answer = model.invoke([*history, asked, result])
streamed = "".join(chunk.text for chunk in model.stream(history))
city = model.with_structured_output(City).invoke(history)
report(answer=answer.text, streamed=streamed, parsed=city.name)
