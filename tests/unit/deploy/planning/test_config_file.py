"""A config file that loses what it says is refused before anything reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.deploy.planning.config_file import config_file_to_read, has_sections
from serving.errors import OperatorError


def written(folder: Path, text: str) -> Path:
    path = folder / "config" / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router:\n  policy: kv\nengine: {}\nrouter:\n  temperature: 1\n", "lines 1 and 4"),
        ("router:\n  policy: kv\n  policy: random\n", "`policy` twice, in lines 2 and 3"),
        ("router:\n\tpolicy: kv\n", "YAML takes no tabs"),
        ("- router\n", "has no sections"),
        ("nonsense\n", "has no sections"),
        ("router: {policy\n", "line 2"),
        ("router: {}\n---\nengine: {}\n", "line 2"),
        ("router: *nobody\n", "undefined alias"),
    ],
)
def test_file_that_would_be_read_wrongly_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OperatorError) as caught:
        has_sections(written(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only comments\n", "---\n", "null\n"])
def test_empty_file_is_the_defaults(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert config_file_to_read(Path("/nowhere")) is None


def test_anchors_and_merges_are_not_repetitions(tmp_path: Path) -> None:
    text = "mock: &base\n  speedup: 1\nrouter:\n  <<: *base\n  <<: *base\n  speedup: 2\n"
    assert has_sections(written(tmp_path, text))


def test_other_folder_uses_the_config_of_the_checkout_until_it_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, folder = tmp_path / "checkout", tmp_path / "folder"
    written(checkout, "router: {policy: random}\n")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert config_file_to_read(checkout) == checkout / "config" / "config.yaml"
    written(folder, "router: {policy: kv}\n")
    assert config_file_to_read(checkout) == Path("config/config.yaml")
