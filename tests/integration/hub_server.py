"""A model hub on loopback: the part of its API that a download uses, and its ways to fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40
OTHER_COMMIT = "b" * 40


@dataclass
class Hub:
    """What it holds and how it behaves; tests change it between downloads.

    `revisions` maps a branch to its commit, `files` a commit to contents by name. Names in `lfs`
    are listed by sha256. `break_after[name]` bytes the connection is dropped, `breaks` times.
    """

    model_id: str = "org/tiny"
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=lambda: {"model.safetensors"})
    corrupt: set[str] = field(default_factory=set)
    pretend_size: dict[str, int] = field(default_factory=dict)
    break_after: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    gated: bool = False
    token: str | None = None
    ignore_ranges: bool = False
    instead_of_listing: dict[str, Any] | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self, name: str) -> list[str | None]:
        """The Range header of every GET of a file."""
        return [ranged for verb, path, ranged in self.requests if verb == "GET" and name in path]

    def listing(self, commit: str) -> dict[str, Any]:
        if self.instead_of_listing is not None:
            return self.instead_of_listing
        siblings: list[dict[str, Any]] = []
        for name, content in self.files[commit].items():
            size = self.pretend_size.get(name, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            entry = {"rfilename": name, "size": size, "blobId": blob.hexdigest()}
            if name in self.lfs:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": self.model_id,
            "modelId": self.model_id,
            "sha": commit,
            "private": False,
            "gated": "manual" if self.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Tests look at `hub.requests` instead."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("range")))
        authorization = self.headers.get("authorization")
        if authorization and authorization != f"Bearer {hub.token}":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.model_info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[2], match[3], authorization)
        return self.refuse(404, "EntryNotFound", "Entry not found")

    def refuse(self, status: int, code: str | None, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.answer(status, headers, body)

    def model_info(self, model_id: str, revision: str) -> None:
        hub = self.hub
        if model_id != hub.model_id:
            # As the hub does: it does not reveal which private models exist.
            status = 404 if self.headers.get("authorization") else 401
            return self.refuse(status, "RepoNotFound", "Repository not found")
        commit = hub.revisions.get(revision, revision)
        if commit not in hub.files:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        body = json.dumps(hub.listing(commit)).encode()
        return self.answer(200, {"Content-Type": "application/json"}, body)

    def resolve(self, commit: str, name: str, authorization: str | None) -> None:
        hub = self.hub
        if hub.gated:
            status = 403 if authorization else 401
            return self.refuse(status, "GatedRepo", "Access to model org/tiny is restricted")
        content = hub.files[commit][name]
        etag = hashlib.sha256(content).hexdigest()
        if name in hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if ranged and not hub.ignore_ranges:
            status, start = 206, int(ranged[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = hub.break_after.get(name)
        if limit is not None and hub.breaks > 0 and start < limit:
            hub.breaks -= 1
            return self.answer(status, headers, content[start:], cut=limit - start)
        return self.answer(status, headers, content[start:])

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub, "timeout": 5.0})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
