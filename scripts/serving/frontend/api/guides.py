"""The fields that constrain the form of an answer: OpenAI's `response_format`, and `guided_*`.

Each becomes a `Guide`. This module only reads the fields. A guide is compiled with the model's
tokenizer, before anything runs.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from serving.errors import InvalidRequest
from serving.protocol import Guide

ANY_OBJECT = '{"type":"object"}'

Source = Annotated[str, Meta(min_length=1, max_length=65536)]


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """No constraint."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchema(Struct, forbid_unknown_fields=True):
    """Every schema is enforced, whatever `strict` says."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that fits a schema."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class GuideFields(Struct, kw_only=True):
    """At most one of these fields may be set."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Source | None = None
    guided_choice: Annotated[list[Source], Meta(min_length=1, max_length=1024)] | None = None
    guided_grammar: Source | None = None

    def guide(self) -> NamedGuide | None:
        """Raises InvalidRequest if several are set, or one is not valid JSON."""
        given = [
            NamedGuide(guide, name)
            for name, guide in (
                ("response_format", self._from_format()),
                ("guided_json", self._from_json()),
                ("guided_regex", _guide("regex", self.guided_regex)),
                ("guided_choice", self._from_choice()),
                ("guided_grammar", _guide("grammar", self.guided_grammar)),
            )
            if guide is not None
        ]
        if len(given) > 1:
            names = ", ".join(f"`{each.param}`" for each in given)
            raise InvalidRequest(f"Only one of {names} can be used", param=given[1].param)
        return given[0] if given else None

    def _from_format(self) -> Guide | None:
        match self.response_format:
            case JsonObjectFormat():
                return Guide("json_schema", ANY_OBJECT)
            case JsonSchemaFormat(json_schema):
                schema = json_schema.schema
                return Guide("json_schema", ANY_OBJECT if schema is None else _json(schema))
        return None

    def _from_json(self) -> Guide | None:
        schema: Any = self.guided_json
        if isinstance(schema, str):
            try:
                schema = msgspec.json.decode(schema)
            except (msgspec.DecodeError, RecursionError) as exc:
                raise InvalidRequest(
                    f"`guided_json` is not valid JSON: {exc}",
                    param="guided_json",
                    code="invalid_grammar",
                ) from None
        return None if schema is None else Guide("json_schema", _json(schema))

    def _from_choice(self) -> Guide | None:
        if self.guided_choice is None:
            return None
        return Guide("regex", "|".join(f"(?:{_escaped(each)})" for each in self.guided_choice))


class NamedGuide(NamedTuple):
    """A guide and the field that set it."""

    guide: Guide
    param: str


def _guide(kind: Any, text: str | None) -> Guide | None:
    return None if text is None else Guide(kind, text)


def _json(schema: Any) -> str:
    return msgspec.json.encode(schema).decode()


def _escaped(text: str) -> str:
    """A regular expression that matches `text` only."""
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)
