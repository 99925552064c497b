"""What several integration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.deployment import Deployment


@pytest.fixture(scope="session")
def default_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`results/` with the default model downloaded and its engine built, by the workflow."""
    deployment = Deployment(tmp_path_factory.mktemp("default"))
    deployment.snakemake("build_engine")
    return deployment.directory / "results"
