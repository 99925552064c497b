"""Stream one file from the hub: continued where it stopped, verified before it counts.

The library does not resume what another process began, so the bytes are streamed here. A partial
file lies beside the finished ones, named after the checksum that it will have.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from msgspec import Struct

from serving.config import ModelConfig
from serving.deploy.model.hub_errors import explain_hub_error
from serving.deploy.model.transfer_progress import TransferProgress
from serving.engine.files import human
from serving.errors import ModelError
from serving.progress import Report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REQUEST_TIMEOUT = httpx.Timeout(20.0, read=30.0)

_ATTEMPTS = 4  # in a row without any new byte
_CHUNK_BYTES = 1024 * 1024
_RETRYABLE = {408, 429, 500, 502, 503, 504}


class HubFile(Struct, frozen=True):
    """One file as the hub lists it: LFS files by sha256 of the content, others by git's blob id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob_id

    def matches(self, path: Path) -> bool:
        """Whether `path` holds exactly this file. Reads all of it."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        hasher = hashlib.sha256() if self.sha256 else hashlib.sha1(usedforsecurity=False)
        if not self.sha256:
            hasher.update(b"blob %d\0" % self.size)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest() == self.digest


class _Retry(Exception):
    """The connection failed in a way that another attempt may mend."""


class HubDownload:
    """Fetches files of one model at one commit (`config.revision`) into `folder`."""

    def __init__(
        self,
        api: HfApi,
        config: ModelConfig,
        folder: Path,
        *,
        report: Report,
        retry_after_s: float,
    ) -> None:
        self.api, self.config, self.folder = api, config, folder
        self.report, self.retry_after_s = report, retry_after_s

    def partial(self, file: HubFile) -> Path:
        return self.folder / f".{file.name.replace('/', '--')}.{file.digest[:16]}.partial"

    def fetch(self, file: HubFile) -> None:
        """Complete and verify `file`. Raises ModelError; what arrived is kept unless it is wrong."""
        partial = self.partial(file)
        attempts = 0
        while not partial.exists() or partial.stat().st_size != file.size:
            have = size_of(partial)
            if have > file.size:
                partial.unlink()
            try:
                self._append(file, partial)
            except _Retry as exc:
                arrived = size_of(partial)
                attempts = 1 if arrived > have else attempts + 1
                if attempts >= _ATTEMPTS:
                    raise ModelError(
                        f"{file.name} stopped at {human(arrived)} of {human(file.size)}: {exc}",
                        remedy="run the same command again: it continues from there",
                    ) from exc
                self.report(f"{file.name}: {exc}; trying again")
                time.sleep(self.retry_after_s * 2 ** (attempts - 1))
        if not file.matches(partial):
            partial.unlink()
            raise ModelError(
                f"{file.name} arrived with a wrong checksum and was removed",
                remedy="run the same command again; if it stays wrong, a proxy or mirror alters it",
            )
        target = self.folder / file.name
        target.parent.mkdir(exist_ok=True)
        partial.replace(target)

    def _append(self, file: HubFile, partial: Path) -> None:
        """One request for the rest of `file`. Raises _Retry when another request may help."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

        # Ranges must count the file's own bytes. The client drops the token on its way to a CDN.
        headers = {"accept-encoding": "identity"}
        if self.api.token:
            headers["authorization"] = f"Bearer {self.api.token}"
        if have := size_of(partial):
            headers["range"] = f"bytes={have}-"
        url = hf_hub_url(
            self.config.id, file.name, revision=self.config.revision, endpoint=self.api.endpoint
        )
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=REQUEST_TIMEOUT
            ) as response:
                if response.status_code in _RETRYABLE:
                    raise _Retry(f"the hub answered {response.status_code}")
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    partial.unlink(missing_ok=True)
                    raise _Retry("the hub refused to continue the partial file")
                hf_raise_for_status(response)
                # A plain 200 ignored the range and starts over.
                continues = response.status_code == httpx.codes.PARTIAL_CONTENT
                with partial.open("ab" if continues else "wb") as out:
                    have = out.tell()
                    with TransferProgress(
                        file.name, file.size, self.report, done_bytes=have
                    ) as progress:
                        for chunk in response.iter_bytes():
                            have += out.write(chunk)
                            progress.advance_to(have)
        except httpx.TransportError as exc:
            raise _Retry(str(exc) or type(exc).__name__) from exc
        except httpx.HTTPError as exc:
            raise explain_hub_error(exc, self.config, self.api) from exc
        if size_of(partial) < file.size:
            raise _Retry("the connection ended early")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
