"""Supported versions, and what a class can be asked about itself."""

import dataclasses
from typing import ClassVar

import pytest
from serving.engine.trtllm.versions import fields_of, parse_version
from serving.errors import OperatorError


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1.0.0", (1, 0)),
        ("1.1.0rc2", (1, 1)),
        ("1.2.0rc6.post1", (1, 2)),
        ("1.2.1", (1, 2)),
        ("1.3.0rc27", (1, 3)),
        ("1.3.0rc1.dev20251103", (1, 3)),
        ("1.3.0+cu131", (1, 3)),
    ],
)
def test_releases_and_pre_releases_belong_to_their_line(text: str, line: tuple[int, int]) -> None:
    version = parse_version(text)
    assert version.line == line
    assert str(version) == text


@pytest.mark.parametrize("text", ["0.21.0", "1.4.0rc1", "2.0", "11.3.0", "1.30.0", "unknown", ""])
def test_other_versions_are_refused_by_name(text: str) -> None:
    with pytest.raises(OperatorError, match=r"1\.0, 1\.1, 1\.2, 1\.3") as caught:
        parse_version(text)
    assert f"TensorRT-LLM {text}" in caught.value.what
    assert caught.value.remedy


def test_fields_are_those_that_the_constructor_takes() -> None:
    @dataclasses.dataclass
    class Record:
        given: int
        hidden: int = dataclasses.field(default=0, init=False)

    class Model:
        model_fields: ClassVar[dict[str, None]] = {"one": None, "two": None}

    assert fields_of(Record) == {"given"}
    assert fields_of(Model) == {"one", "two"}
    assert fields_of(object) is None
    assert fields_of(None) is None
