"""Which format a model uses, decided from its chat template or by configuration."""

from __future__ import annotations

from msgspec import Struct

from serving.text.tool_calls import (
    gemma,
    harmony,
    named_json,
    plain_json,
    pythonic,
    tagged_json,
    xml_parameters,
)
from serving.text.tool_calls.base import ToolFormat

# Formats whose markers are unmistakable come first; Hermes' `<tool_call>` is part of others.
FORMATS: tuple[ToolFormat, ...] = (
    *xml_parameters.FORMATS,
    *harmony.FORMATS,
    *gemma.FORMATS,
    *named_json.FORMATS,
    *pythonic.FORMATS,
    *tagged_json.FORMATS,
    *plain_json.FORMATS,
)
BY_NAME: dict[str, ToolFormat] = {each.name: each for each in (*FORMATS, plain_json.FALLBACK)}


class Selection(Struct, frozen=True):
    """A format and the reason for it, for people. `template_knows_tools`: it renders `tools`."""

    format: ToolFormat
    reason: str
    template_knows_tools: bool


def select_format(setting: str, template: str) -> Selection:
    """`setting` is a format's name or `auto`; `template` is the source of the chat template."""
    knows_tools = "tools" in template
    if setting != "auto":
        return Selection(BY_NAME[setting], "set in the configuration", knows_tools)
    if not template:
        return Selection(plain_json.FALLBACK, "the model has no chat template", False)
    for each in FORMATS:
        if each.fits(template):
            return Selection(each, "its markers are in the chat template", knows_tools)
    if not knows_tools:
        return Selection(plain_json.FALLBACK, "the chat template renders no tools", False)
    return Selection(
        plain_json.FALLBACK,
        "the chat template renders tools in a format without known markers",
        True,
    )
