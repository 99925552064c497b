"""JSON as Python's `json` writes it, which chat templates were made with, remembered for large values.

Agents send the same tools with each request. orjson's bytes identify a value in a tenth of the time
that `json` takes to write it.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

MIN_KEPT_BYTES, MAX_KEPT_BYTES, MAX_KEPT = 256, 256 * 1024, 64
"""JSON texts that are remembered: their sizes, and how many of them."""
_known: dict[Any, str] = {}


def json_text(
    value: Any,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As `json.dumps` with these options. Raises TypeError and ValueError like it."""

    def dumps() -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    try:
        data = orjson.dumps(value)
    except (TypeError, ValueError):  # Jinja's own types, or integers beyond 64 bits
        return dumps()
    if not MIN_KEPT_BYTES <= len(data) <= MAX_KEPT_BYTES:
        return dumps()
    key = (data, ensure_ascii, indent, separators, sort_keys)
    text = _known.get(key)
    if text is None:
        text = dumps()
        if len(_known) >= MAX_KEPT:
            _known.clear()
        _known[key] = text
    return text
