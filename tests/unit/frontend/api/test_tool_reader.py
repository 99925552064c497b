"""Fields with tools: read once for each text, and errors that name the element."""

import json
from typing import Any

import pytest
from msgspec import Raw
from serving.errors import InvalidRequest
from serving.frontend.api.tools import ABSENT, MAX_TOOLS, ToolReader, read_tool

LONG = {"type": "object", "properties": {"place": {"type": "string", "description": "x" * 300}}}


def raw(value: Any) -> Raw:
    return Raw(json.dumps(value).encode())


@pytest.fixture
def reader() -> ToolReader[dict[str, Any]]:
    return ToolReader("tools", dict[str, Any], read_tool)


@pytest.mark.parametrize("text", [ABSENT, Raw(b"[]")])
def test_no_tools(reader: ToolReader[dict[str, Any]], text: Raw) -> None:
    assert reader.read(text).tools == ()


def test_equal_texts_share_what_is_made_of_them(reader: ToolReader[dict[str, Any]]) -> None:
    made = []

    def count(tools: Any) -> int:
        made.append(tools)
        return len(tools)

    for _ in range(3):
        tools = reader.read(raw([{"name": "find", "parameters": LONG}])).tools
        assert tools.derive("number", count) == 1
    assert len(made) == 1
    other = reader.read(raw([{"name": "seek", "parameters": LONG}])).tools
    assert [tool.name for tool in other] == ["seek"]
    assert other.derive("number", count) == 1
    assert len(made) == 2


def test_what_is_kept_is_bounded(reader: ToolReader[dict[str, Any]]) -> None:
    for number in range(100):
        name = f"find{number}"
        assert reader.read(raw([{"name": name, "parameters": LONG}])).tools[0].name == name
    assert len(reader._known) <= 32


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("find", "tools"),
        ([{"name": "find"}, 3], "tools[1]"),
        ([{"name": "find"}, {"name": "no spaces"}], "tools[1].name"),
        ([{"name": "find"}] * (MAX_TOOLS + 1), "tools"),
    ],
)
def test_an_error_names_the_element_each_time(
    reader: ToolReader[dict[str, Any]], value: Any, param: str
) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            reader.read(raw(value))
        assert caught.value.param == param


def test_text_that_is_not_unicode_is_refused(reader: ToolReader[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        reader.read(Raw(b'[{"name": "\xff"}]'))
