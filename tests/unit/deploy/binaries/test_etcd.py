"""Sources of etcd in order, versions that are refused, checksums that must match."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serving.deploy.binaries.etcd import check_etcd_version, resolve_etcd
from serving.deploy.binaries.etcd_fetch import Release, Unavailable, fetch_debian_package
from serving.errors import OperatorError


def fake_etcd(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'etcd Version: {version}'\n")
    path.chmod(0o755)
    return path


def tarball(version: str, tmp_path: Path) -> bytes:
    script = fake_etcd(tmp_path / "packed", version)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        archive.add(script, f"etcd-v{version}-linux-amd64/etcd")
    return data.getvalue()


@pytest.fixture
def upstream() -> Iterator[dict[str, bytes]]:
    """A loopback server: path to body; `url` is under the key "url"."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    files["url"] = f"http://127.0.0.1:{server.server_port}".encode()
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def release_of(upstream: dict[str, bytes], body: bytes, version: str = "3.5.21") -> Release:
    upstream[f"/v{version}/etcd-v{version}-linux-amd64.tar.gz"] = body
    checksum = hashlib.sha256(body).hexdigest()
    return Release(version, {"amd64": checksum}, upstream["url"].decode())


NOWHERE = Release("3.5.21", {})


def test_etcd_bin_comes_before_path(
    tmp_path: Path, only_sh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = fake_etcd(tmp_path / "chosen", "3.6.1")
    fake_etcd(only_sh / "etcd", "3.5.20")
    monkeypatch.setenv("ETCD_BIN", str(chosen))
    found = resolve_etcd(tmp_path / "cache", report=print, release=NOWHERE)
    assert (found.path, found.version, found.origin) == (chosen, "3.6.1", "ETCD_BIN")


@pytest.mark.parametrize("version", ["3.5.1", None])
def test_unusable_etcd_bin_is_an_error_and_not_skipped(
    version: str | None, tmp_path: Path, only_sh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_etcd(only_sh / "etcd", "3.5.20")
    chosen = tmp_path / "chosen"
    if version:
        fake_etcd(chosen, version)
    monkeypatch.setenv("ETCD_BIN", str(chosen))
    with pytest.raises(OperatorError, match="ETCD_BIN"):
        resolve_etcd(tmp_path / "cache", report=print, release=NOWHERE)


def test_refused_etcd_on_path_is_passed_over_for_the_cache(tmp_path: Path, only_sh: Path) -> None:
    fake_etcd(only_sh / "etcd", "3.5.4")
    cached = fake_etcd(tmp_path / "cache/etcd", "3.5.20")
    said: list[str] = []
    found = resolve_etcd(tmp_path / "cache", report=said.append, release=NOWHERE)
    assert (found.path, found.origin) == (cached, "cache")
    assert any("3.5.4 is refused" in line for line in said)


def test_old_etcd_is_used_with_a_warning(tmp_path: Path, only_sh: Path) -> None:
    fake_etcd(only_sh / "etcd", "3.4.23")
    said: list[str] = []
    found = resolve_etcd(tmp_path / "cache", report=said.append, release=NOWHERE)
    assert found.origin == "PATH"
    assert any("3.4.32" in line for line in said)


def test_release_with_the_pinned_checksum_is_unpacked_into_the_cache(
    tmp_path: Path, only_sh: Path, upstream: dict[str, bytes]
) -> None:
    release = release_of(upstream, tarball("3.5.21", tmp_path))
    cache = tmp_path / "cache"
    found = resolve_etcd(cache, report=print, release=release)
    assert (found.path, found.version, found.origin) == (cache / "etcd", "3.5.21", "release")
    assert [p.name for p in cache.iterdir()] == ["etcd"]  # nothing half-done beside it
    assert resolve_etcd(cache, report=print, release=NOWHERE).origin == "cache"


def test_release_with_another_checksum_is_not_kept(
    tmp_path: Path, only_sh: Path, upstream: dict[str, bytes]
) -> None:
    body = tarball("3.5.21", tmp_path)
    release = release_of(upstream, body)
    upstream["/v3.5.21/etcd-v3.5.21-linux-amd64.tar.gz"] = body + b"x"
    with pytest.raises(OperatorError, match="checksum") as caught:
        resolve_etcd(tmp_path / "cache", report=print, release=release)
    assert "ETCD_BIN" in caught.value.remedy
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_reachable_lists_every_source_and_a_remedy(
    tmp_path: Path, only_sh: Path, upstream: dict[str, bytes]
) -> None:
    release = Release("3.5.21", {"amd64": "0" * 64}, upstream["url"].decode())
    with pytest.raises(OperatorError) as caught:
        resolve_etcd(tmp_path / "cache", report=print, release=release)
    assert "404" in caught.value.what
    assert "not a Debian" in caught.value.what
    assert "ETCD_BIN" in caught.value.remedy


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ((3, 4, 23), "warn"),
        ((3, 4, 32), "fine"),
        ((3, 5, 0), "refuse"),
        ((3, 5, 5), "refuse"),
        ((3, 5, 6), "warn"),
        ((3, 5, 14), "fine"),
        ((3, 6, 0), "fine"),
    ],
)
def test_verdict_on_etcd_versions(version: tuple[int, int, int], verdict: str) -> None:
    if verdict == "refuse":
        with pytest.raises(OperatorError):
            check_etcd_version(version)
    else:
        assert (check_etcd_version(version) is None) == (verdict == "fine")


def test_lists_that_apt_could_not_fetch_are_the_reason_and_not_what_follows(
    only_sh: Path, tmp_path: Path
) -> None:
    """apt warns, ends with 0, and cannot locate the package afterwards."""
    script = """#!/bin/sh
case "$*" in
  *Error-Mode=any*update*)
    echo "E: Failed to fetch http://deb.debian.org/x  Could not connect" >&2
    echo "E: Some index files failed to download." >&2; exit 100;;
  *update*) echo "W: Failed to fetch http://deb.debian.org/x" >&2; exit 0;;
  *) echo "E: Unable to locate package etcd-server" >&2; exit 100;;
esac
"""
    for name in ("apt-get", "dpkg"):
        (only_sh / name).write_text(script)
        (only_sh / name).chmod(0o755)
    with pytest.raises(Unavailable, match=r"Failed to fetch http://deb\.debian\.org/x"):
        fetch_debian_package(tmp_path, [].append)
