"""The generated documentation of the configuration, and that it is up to date."""

import json
from pathlib import Path

import msgspec
import pytest
from serving.config import Config
from serving.config import docs as config_docs

FOLDER = Path(__file__).parents[3] / "config"


def test_committed_page_and_schema_agree_with_the_types() -> None:
    assert config_docs.stale(FOLDER) == [], "run `python -m serving.config.docs --write`"


def test_page_has_a_row_for_every_key() -> None:
    page = config_docs.render_page()
    for section in msgspec.structs.fields(Config):
        body = page.split(f"\n## {section.name}\n")[1].split("\n## ")[0]
        for key in msgspec.structs.fields(section.type):
            assert f"\n| `{key.name}` |" in body


def test_rows_have_four_cells() -> None:
    rows = [line for line in config_docs.render_page().splitlines() if line.startswith("| ")]
    assert rows
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}


def test_page_shows_types_bounds_and_defaults() -> None:
    page = config_docs.render_page()
    assert "| `port` | integer ≥ 1, ≤ 65535 | `8000` |" in page
    assert "| `gpus` | list of integer ≥ 0, ≤ 4096 or null | none |" in page


def test_schema_refuses_unknown_keys() -> None:
    schema = json.loads(config_docs.render_schema())
    assert all(
        definition["additionalProperties"] is False for definition in schema["$defs"].values()
    )


def test_check_fails_on_a_page_edited_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config_docs.main(["--write", "--folder", str(tmp_path)]) == 0
    assert config_docs.main(["--check", "--folder", str(tmp_path)]) == 0
    page = tmp_path / "README.md"
    page.write_text(page.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    assert config_docs.main(["--check", "--folder", str(tmp_path)]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
