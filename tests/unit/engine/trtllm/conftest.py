"""An engine folder for the stand-in library, and the library itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.engine import trtllm_rig as rig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.make_engine_dir(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with rig.standin(monkeypatch):
        yield
