"""A loopback server that stands in for the host of etcd's releases."""

from __future__ import annotations

import hashlib
import io
import platform
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serving.deploy.binaries.etcd_fetch import Release

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")


class ReleaseServer:
    """Serves `files`, a body for each path, from `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}

    def publish(self, version: str, executable: Path) -> Release:
        """Offers the executable as etcd `version`; returns where it is, with its checksum."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:
            archive.add(executable, f"etcd-v{version}-linux-{ARCHITECTURE}/etcd")
        body = data.getvalue()
        self.files[self.path(version)] = body
        return Release(version, {ARCHITECTURE: hashlib.sha256(body).hexdigest()}, self.url)

    def path(self, version: str) -> str:
        return f"/v{version}/etcd-v{version}-linux-{ARCHITECTURE}.tar.gz"


@contextmanager
def release_server() -> Iterator[ReleaseServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = releases.files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        releases = ReleaseServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield releases
        finally:
            server.shutdown()
            thread.join()
