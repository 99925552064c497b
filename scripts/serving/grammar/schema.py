"""JSON schemas as llguidance takes them: without formats that it does not know, with tight spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KNOWN_FORMATS = frozenset(
    [
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "unknown",
        "uri",
        "uuid",
    ]
)
TIGHT: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""JSON in one style. Free white space costs tokens, and a model in doubt writes it without end."""

# Their values are data, in which a key called "format" is no keyword.
_DATA = frozenset(("const", "enum", "default", "example", "examples"))
_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))


def without_unknown_formats(schema: Any) -> Any:
    """The same, less each `format` that nothing here can enforce: it is an annotation.

    Raises RecursionError for a schema that is nested very deeply.
    """
    if isinstance(schema, list):
        return [without_unknown_formats(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    known: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in KNOWN_FORMATS:
            continue
        if key in _BY_NAME and isinstance(value, Mapping):
            known[key] = {name: without_unknown_formats(each) for name, each in value.items()}
        else:
            known[key] = value if key in _DATA else without_unknown_formats(value)
    return known


def tight_schema(schema: Any) -> Any:
    """A schema for `%json` in a grammar: it carries its options with it."""
    if not isinstance(schema, Mapping):
        return schema
    return {**without_unknown_formats(schema), "x-guidance": TIGHT}


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
