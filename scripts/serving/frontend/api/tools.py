"""Tools as requests describe them, the same for every API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidRequest
from serving.text.tool_calls.base import Tool

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
MAX_TOOLS = 512


def read_tool(function: Mapping[str, Any], where: str, *, schema_key: str = "parameters") -> Tool:
    """A function. Raises InvalidRequest for a bad name or a schema that is no object."""
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(
            f"`{where}.name` must have 1 to 128 letters, digits, `_`, `-`, `.`, `:` or `/`",
            param=f"{where}.name",
        )
    schema = function.get(schema_key)
    if schema is None:
        schema = {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            f"`{where}.{schema_key}` must be a JSON schema", param=f"{where}.{schema_key}"
        )
    strict = bool(function.get("strict"))
    description = function.get("description")
    return Tool(
        name=name,
        parameters=closed_schema(schema) if strict else dict(schema),
        description=description if isinstance(description, str) else "",
        strict=strict,
    )


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `additionalProperties: false` in every object that does not say otherwise.

    OpenAI requires strict schemas to say so themselves; many clients leave it out.
    """
    closed: dict[str, Any] = {key: _closed(value) for key, value in schema.items()}
    if closed.get("type") == "object" or "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "type" in value or "properties" in value or "items" in value or "anyOf" in value:
        return closed_schema(value)
    return {key: _closed(each) for key, each in value.items()}
