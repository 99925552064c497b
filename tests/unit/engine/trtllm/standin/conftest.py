"""A tiny model, its greedy answer, and the stand-in as the newest and as any version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.tiny_model import save_tiny_model
from unit.engine.trtllm.standin import standin_rig as rig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """What transformers says, greedily, after PROMPT."""
    from unit.engine.torch_rig import generate

    return generate(model, rig.PROMPT, 12)


@pytest.fixture(params=rig.VERSIONS)
def any_version(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> Iterator[Any]:
    with rig.installed(tmp_path, request.param) as root:
        library = rig.Library(root, model)
        yield library
        library.shut_down()


@pytest.fixture
def library(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("STANDIN_TRTLLM_TRANSPORT", "tcp")
    with rig.installed(tmp_path, rig.NEWEST) as root:
        library = rig.Library(root, model)
        yield library
        library.shut_down()
