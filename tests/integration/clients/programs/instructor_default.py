"""instructor: its default mode, which is a tool that must be called, and a list of objects."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
from pydantic import BaseModel
from weather import BASE_URL, MODEL, QUESTION, get_weather, report


class GetWeather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Oslo"]


client = instructor.from_openai(openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none"))
call = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": QUESTION}],
    response_model=GetWeather,
    max_tokens=128,
    temperature=0,
    max_retries=0,
)
get_weather(call.city)
report(mode=str(client.mode))
