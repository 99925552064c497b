"""Tools as requests describe them, read once for all requests that bring the same ones.

Agents send the same tools with each request, often more bytes than all the rest of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.fields import decode_field
from serving.grammar.schema import closed_schema
from serving.text.tool_calls.base import Tool, ToolSet

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
MAX_TOOLS = 512
ABSENT = Raw(b"null")
"""The default of fields for a `ToolReader`: it leaves the decoding to it."""

MIN_KEPT_BYTES, MAX_KEPT_BYTES, MAX_KEPT = 256, 256 * 1024, 32
"""Sizes of lists that a reader keeps, and how many of them. Decoded, they take some ten times as
much memory."""

Described = TypeVar("Described")


class RequestTools(Struct, frozen=True, eq=False):
    """The functions of a request, and the types of the tools that are none and are ignored."""

    tools: ToolSet
    ignored: tuple[str, ...] = ()


class ToolReader(Generic[Described]):
    """Reads a field with a list of tools, whose elements have the type `described`."""

    def __init__(
        self,
        field: str,
        described: type[Described],
        read: Callable[[Described, str], Tool | str],
    ) -> None:
        """`read` makes an element a tool, or returns the type of one that is ignored. It gets the
        element's name, such as `tools[0]`, and may raise InvalidRequest."""
        self._field, self._read_one = field, read
        self._decoder = msgspec.json.Decoder(
            Annotated[list[described], Meta(max_length=MAX_TOOLS)] | None  # type: ignore[valid-type]
        )
        self._known: dict[bytes, RequestTools] = {}

    def read(self, text: Raw) -> RequestTools:
        """Raises InvalidRequest."""
        key = bytes(text)
        known = self._known.get(key)
        if known is not None:
            return known
        found = self._read(text)
        if MIN_KEPT_BYTES <= len(key) <= MAX_KEPT_BYTES:
            if len(self._known) >= MAX_KEPT:
                self._known.clear()
            self._known[key] = found
        return found

    def _read(self, text: Raw) -> RequestTools:
        described = decode_field(self._decoder, text, self._field) or []
        read = [self._read_one(each, f"{self._field}[{i}]") for i, each in enumerate(described)]
        return RequestTools(
            ToolSet(each for each in read if isinstance(each, Tool)),
            tuple(each for each in read if isinstance(each, str)),
        )


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
