"""One real deployment and one scripted service for all clients, and the environments of clients."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.clients.environments import Install, from_npm, from_pypi
from integration.clients.scripted_service import ScriptedService, scripted_service
from integration.deployment import REPO, Deployment, running, share_results

ENVIRONMENTS = ("clients", "clients-instructor")


@pytest.fixture(scope="session")
def installs() -> Iterator[dict[str, Install]]:
    """Begun together: they mostly wait for the network, and the deployment starts meanwhile."""
    begun = {name: from_pypi(REPO / "envs" / f"{name}.txt") for name in ENVIRONMENTS}
    yield begun
    for install in begun.values():
        install.cancel()


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    installs: dict[str, Install],
    default_results: Path,
) -> Iterator[Deployment]:
    """The bundled model with as much context as it has, served by one worker."""
    deployment = Deployment(
        tmp_path_factory.mktemp("clients"),
        engine={"max_model_len": 8192, "kv_cache_tokens": 16384, "num_threads": 2},
    )
    share_results(default_results, deployment.directory / "results")
    with running(deployment, "serve_agg"):
        yield deployment


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedService]:
    """The real frontend before a scripted model; a test sets the script."""
    with scripted_service(tmp_path / "scripted") as service:
        yield service


@pytest.fixture(scope="session")
def client_folder(installs: dict[str, Install]) -> Path:
    """The virtual environment of the Python clients."""
    return installs["clients"].wait()


@pytest.fixture(scope="session")
def instructor_folder(installs: dict[str, Install]) -> Path:
    """The virtual environment of instructor."""
    return installs["clients-instructor"].wait()


@pytest.fixture(scope="session")
def npm_folder() -> Path:
    """The folder with the `node_modules` of the clients from npm."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"clients from npm: {program} not found")
    return from_npm(REPO / "envs" / "clients-npm" / "package.json").wait()
