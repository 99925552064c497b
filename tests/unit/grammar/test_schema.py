"""Schemas lose the formats that nobody enforces, and nothing else."""

from serving.grammar.schema import without_unknown_formats


def test_unknown_formats_go_and_known_ones_stay() -> None:
    assert without_unknown_formats(
        {
            "properties": {
                "format": {"type": "string", "format": "phone"},
                "when": {"type": "string", "format": "date"},
            },
            "items": [{"format": "color"}],
            "const": {"format": "phone"},
        }
    ) == {
        "properties": {
            "format": {"type": "string"},
            "when": {"type": "string", "format": "date"},
        },
        "items": [{}],
        "const": {"format": "phone"},
    }
