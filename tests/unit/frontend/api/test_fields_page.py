"""The page about fields names every field that a request type has."""

import re
from pathlib import Path

import msgspec
import pytest
from serving.frontend.api.chat.request import ChatRequest
from serving.frontend.api.completions import CompletionRequest
from serving.frontend.api.messages.request import MessagesRequest
from serving.frontend.api.responses.request import ResponsesRequest

PAGE = Path(__file__).parents[4] / "docs" / "fields.md"


@pytest.mark.parametrize(
    "request_type", [ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest]
)
def test_every_field_is_in_a_table(request_type: type[msgspec.Struct]) -> None:
    named = set(re.findall(r"`([a-z_]+)", PAGE.read_text()))
    fields = {field.name for field in msgspec.structs.fields(request_type)}
    assert not fields - named
