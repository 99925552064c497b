"""The hub's cache in a person's home: what other programs fetched before is not fetched again.

    models--org--name/refs/main                 a commit
    models--org--name/snapshots/COMMIT/FILE     a link to ../../blobs/DIGEST

A file from the cache counts only when it has the checksum that names it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from serving.deploy.model.hub_download import HubFile
from serving.engine.files import sha256_of

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOB_ID = re.compile(r"[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubCache:
    """The cached files of one model. They are only read."""

    def __init__(self, model_id: str, root: Path | None = None) -> None:
        """`root` is the cache's folder, by default that of huggingface_hub."""
        if root is None:
            from huggingface_hub import constants

            root = Path(constants.HF_HUB_CACHE)
        self.folder = root / f"models--{model_id.replace('/', '--')}"

    def listing(self, revision: str) -> tuple[str, dict[str, HubFile]] | None:
        """The commit of a branch, tag or commit, and its top-level files here; None if it is not here.

        Some files of the commit may be missing.
        """
        commit = revision
        if not _COMMIT.fullmatch(revision):
            try:
                commit = (self.folder / "refs" / revision).read_text().strip()
            except (OSError, UnicodeDecodeError):
                return None
        snapshot = self.folder / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
            return None
        files = [path for path in snapshot.iterdir() if path.is_file()]
        return commit, {path.name: _described(path) for path in files}

    def has(self, file: HubFile) -> bool:
        """Whether `file` seems to be here, by its name and size."""
        found = self._find(file)
        return found.is_file() and found.stat().st_size == file.size

    def take(self, file: HubFile, target: Path) -> bool:
        """Have `file` at `target`, if it is here and whole."""
        found = self._find(file)
        if not file.matches(found):
            return False
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(found.resolve(), temporary)
        except OSError:  # another file system
            shutil.copyfile(found, temporary)
        temporary.replace(target)
        return True

    def _find(self, file: HubFile) -> Path:
        blob = self.folder / "blobs" / file.digest
        if blob.is_file():
            return blob
        # Some systems have no links, and snapshots then hold the files.
        copies = self.folder.glob(f"snapshots/*/{file.name}")
        return next((path for path in copies if path.stat().st_size == file.size), blob)


def _described(path: Path) -> HubFile:
    digest = path.resolve().name
    size = path.stat().st_size
    if path.is_symlink() and _SHA256.fullmatch(digest):
        return HubFile(path.name, size, digest, digest)
    if path.is_symlink() and _BLOB_ID.fullmatch(digest):
        return HubFile(path.name, size, None, digest)
    sha256 = sha256_of(path)
    return HubFile(path.name, size, sha256, sha256)
