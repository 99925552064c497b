"""The fields that constrain the form of an answer: `response_format`, and those of other servers.

Each becomes a `Guide`. This module only reads the fields. A guide is compiled with the model's
tokenizer, before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from serving.errors import InvalidRequest
from serving.grammar.schema import closed_schema, without_unknown_formats
from serving.protocol import Guide

ANY_OBJECT = '{"type":"object"}'

Source = Annotated[str, Meta(min_length=1, max_length=1024 * 1024)]


class TextFormat(Struct, tag_field="type", tag="text"):
    """No constraint."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Struct):
    """Every schema is enforced. With `strict`, objects have no other keys than it names."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema"):
    """JSON that fits a schema."""

    json_schema: JsonSchema


class StructuralTagFormat(Struct, tag_field="type", tag="structural_tag", omit_defaults=True):
    """Text in which triggers open tags: `structures` with `triggers`, or the tree `format`."""

    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat
Schema = dict[str, Any] | str
Choices = Annotated[list[Source], Meta(min_length=1, max_length=1024)]


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's form: exactly one of these."""

    json: Schema | None = None
    json_object: bool | None = None
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    structural_tag: Schema | None = None

    def guides(self) -> list[NamedGuide]:
        """Raises InvalidRequest."""
        where = "structured_outputs"
        found = [
            *_named(f"{where}.json", self.json, _from_schema),
            *_named(f"{where}.regex", self.regex, _from_regex),
            *_named(f"{where}.choice", self.choice, _from_choice),
            *_named(f"{where}.grammar", self.grammar, _from_grammar),
            *_named(f"{where}.structural_tag", self.structural_tag, _from_structural_tag),
        ]
        if self.json_object:
            found.append(NamedGuide(Guide("json_schema", ANY_OBJECT), f"{where}.json_object"))
        return found


class GuideFields(Struct, kw_only=True):
    """At most one of these fields may be set; the last two have no effect."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    json_schema: Schema | None = None
    regex: Source | None = None
    ebnf: Source | None = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None

    def guide(self) -> NamedGuide | None:
        """Raises InvalidRequest if several are set, or one is not valid JSON."""
        given = [
            *_named("response_format", self.response_format, _from_format),
            *(self.structured_outputs.guides() if self.structured_outputs is not None else ()),
            *_named("guided_json", self.guided_json, _from_schema),
            *_named("guided_regex", self.guided_regex, _from_regex),
            *_named("guided_choice", self.guided_choice, _from_choice),
            *_named("guided_grammar", self.guided_grammar, _from_grammar),
            *_named("json_schema", self.json_schema, _from_schema),
            *_named("regex", self.regex, _from_regex),
            *_named("ebnf", self.ebnf, _from_grammar),
        ]
        if len(given) > 1:
            names = ", ".join(f"`{each.param}`" for each in given)
            raise InvalidRequest(f"Only one of {names} can be used", param=given[1].param)
        return given[0] if given else None


class NamedGuide(NamedTuple):
    """A guide and the field that set it."""

    guide: Guide
    param: str


def _named(param: str, value: Any, read: Callable[[Any], Guide | None]) -> list[NamedGuide]:
    """The field's guide, or none. Raises InvalidRequest for `param`."""
    if value is None:
        return []
    try:
        guide = read(value)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(
            f"`{param}` is not valid JSON: {exc}", param=param, code="invalid_grammar"
        ) from None
    return [] if guide is None else [NamedGuide(guide, param)]


def _from_format(format: ResponseFormat) -> Guide | None:
    match format:
        case JsonObjectFormat():
            return Guide("json_schema", ANY_OBJECT)
        case JsonSchemaFormat(json_schema):
            schema = json_schema.schema
            if schema is None:
                return Guide("json_schema", ANY_OBJECT)
            return _from_schema(closed_schema(schema) if json_schema.strict else schema)
        case StructuralTagFormat():
            return Guide("structural_tag", _json(format))
    return None


def _from_schema(schema: Schema) -> Guide:
    value = msgspec.json.decode(schema) if isinstance(schema, str) else schema
    return Guide("json_schema", _json(without_unknown_formats(value)))


def _from_regex(regex: str) -> Guide:
    return Guide("regex", regex)


def _from_choice(choices: list[str]) -> Guide:
    return Guide("regex", "|".join(f"(?:{_escaped(each)})" for each in choices))


def _from_grammar(grammar: str) -> Guide:
    return Guide("grammar", grammar)


def _from_structural_tag(tag: Schema) -> Guide:
    value = msgspec.json.decode(tag, type=dict[str, Any]) if isinstance(tag, str) else tag
    return Guide("structural_tag", _json({"type": "structural_tag", **value}))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _escaped(text: str) -> str:
    """A regular expression that matches `text` only."""
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)
