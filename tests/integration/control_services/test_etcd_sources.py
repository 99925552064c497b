"""A real etcd from each source that the project tries: it is found or fetched, starts and answers.

The release host is a loopback server; apt and the distribution's package are the machine's own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.deployment import REPO
from integration.services import Etcd, etcd_executable
from release_server import ReleaseServer, release_server
from serving.deploy.binaries.binary import Binary
from serving.deploy.binaries.etcd import resolve_etcd
from serving.deploy.binaries.etcd_fetch import Release

pytestmark = pytest.mark.integration

NO_RELEASE = Release("3.5.21", {})


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, without etcd; `apt-get` is there if this machine has it."""
    folder = tmp_path / "tools"
    folder.mkdir()
    subprocess.run([REPO / ".ci" / "link_tools", folder], check=True, timeout=60)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("ETCD_BIN", raising=False)
    return folder


@pytest.fixture
def apt(tools: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("this is not a Debian or Ubuntu system")


@pytest.fixture
def releases() -> Iterator[ReleaseServer]:
    with release_server() as server:
        yield server


def assert_serves(found: Binary, folder: Path) -> None:
    with Etcd(folder, found.path) as etcd:
        assert etcd.answers()


def test_chosen_executable_serves(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCD_BIN", str(etcd_executable()))
    found = resolve_etcd(tmp_path / "cache", report=print, release=NO_RELEASE)
    assert found.origin == "ETCD_BIN"
    assert_serves(found, tmp_path / "etcd")


def test_installed_executable_serves(tools: Path, tmp_path: Path) -> None:
    shutil.copy2(etcd_executable(), tools / "etcd")
    found = resolve_etcd(tmp_path / "cache", report=print, release=NO_RELEASE)
    assert (found.origin, found.path) == ("PATH", tools / "etcd")
    assert_serves(found, tmp_path / "etcd")


def test_release_is_downloaded_serves_and_is_not_downloaded_again(
    tools: Path, tmp_path: Path, releases: ReleaseServer
) -> None:
    release = releases.publish("3.5.21", etcd_executable())
    found = resolve_etcd(tmp_path / "cache", report=print, release=release)
    assert found.origin == "release"
    assert_serves(found, tmp_path / "etcd")
    releases.files.clear()
    assert resolve_etcd(tmp_path / "cache", report=print, release=release).origin == "cache"


def test_package_is_used_where_the_release_host_has_nothing(
    apt: None, tmp_path: Path, releases: ReleaseServer
) -> None:
    release = releases.publish("3.5.21", etcd_executable())
    releases.files.clear()
    lines: list[str] = []
    found = resolve_etcd(tmp_path / "cache", report=lines.append, release=release)
    assert found.origin == "Debian package"
    assert any("404" in line for line in lines)
    assert_serves(found, tmp_path / "etcd")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["etcd"]


def test_package_is_found_without_any_package_lists_on_the_machine(
    apt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh container image comes without lists: they are fetched into a private folder."""
    lists = tmp_path / "no-lists"
    (lists / "partial").mkdir(parents=True)
    settings = tmp_path / "apt.conf"
    settings.write_text(f'Dir::State::Lists "{lists}";\n')
    monkeypatch.setenv("APT_CONFIG", str(settings))
    lines: list[str] = []
    found = resolve_etcd(tmp_path / "cache", report=lines.append, release=NO_RELEASE)
    assert found.origin == "Debian package"
    assert any("fetching them into a private folder" in line for line in lines)
    assert not list((lists / "partial").iterdir())
    assert_serves(found, tmp_path / "etcd")
