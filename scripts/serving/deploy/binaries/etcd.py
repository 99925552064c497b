"""Find a usable etcd executable, or fetch one. Needs no root and starts no service.

This module knows the order of sources and which versions are fit for use. `etcd_fetch` brings what
is not here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from serving.deploy.binaries.binary import Binary, Unavailable, Version, ask_version, version_text
from serving.deploy.binaries.etcd_fetch import (
    ETCD_RELEASE,
    Release,
    fetch_debian_package,
    fetch_release,
)
from serving.errors import OperatorError
from serving.progress import Report

_REMEDY = (
    "install etcd 3.5.14 or newer (https://github.com/etcd-io/etcd/releases) "
    "and point ETCD_BIN at it"
)


def resolve_etcd(cache_dir: Path, *, report: Report, release: Release = ETCD_RELEASE) -> Binary:
    """The first usable etcd of: $ETCD_BIN, PATH, `cache_dir`, the pinned release, Debian's package.

    A fetched executable stays in `cache_dir`. Versions 3.5.0 to 3.5.5 can corrupt data (etcd issue
    13766) and are never used. Raises OperatorError that lists the sources and their problems.
    """
    if chosen := os.environ.get("ETCD_BIN"):
        try:
            return _accept(Path(chosen), "ETCD_BIN", report)
        except Unavailable as exc:
            raise OperatorError(f"ETCD_BIN: {exc}", remedy=_REMEDY) from None
    cached = cache_dir.resolve() / "etcd"  # absolute, since apt and dpkg run in other folders
    sources: dict[str, Callable[[], Binary]] = {}
    if found := shutil.which("etcd"):
        sources["PATH"] = lambda: _accept(Path(found), "PATH", report)
    if cached.exists():
        sources["cache"] = lambda: _accept(cached, "cache", report)
    sources["release"] = lambda: _fetch(
        lambda scratch: fetch_release(release, scratch, report), "release", cached, report
    )
    sources["Debian package"] = lambda: _fetch(
        lambda scratch: fetch_debian_package(scratch, report), "Debian package", cached, report
    )
    problems = []
    for name, resolve in sources.items():
        try:
            return resolve()
        except Unavailable as exc:
            problems.append(f"{name}: {exc}")
            report(f"etcd from {name}: {exc}")
    raise OperatorError("no usable etcd; " + "; ".join(problems), remedy=_REMEDY)


def check_etcd_version(version: Version) -> str | None:
    """A warning about an old etcd, or None. Raises OperatorError for a version that corrupts data."""
    if (3, 5, 0) <= version <= (3, 5, 5):
        raise OperatorError(
            f"etcd {version_text(version)} is refused: 3.5.0 to 3.5.5 can become inconsistent after "
            "a crash",
            remedy=_REMEDY,
        )
    wanted = (3, 4, 32) if version < (3, 5, 0) else (3, 5, 14)
    if version < wanted:
        return (
            f"etcd {version_text(version)} misses fixes of {version_text(wanted)}: good enough for one "
            "machine, but replace it for a shared deployment"
        )
    return None


def _accept(path: Path, origin: str, report: Report) -> Binary:
    """The executable, if its version is fit for use. Raises Unavailable."""
    version = ask_version(path, r"etcd Version: (\d+)\.(\d+)\.(\d+)")
    try:
        warning = check_etcd_version(version)
    except OperatorError as exc:
        raise Unavailable(exc.what) from None
    if warning:
        report(f"warning: {warning}")
    return Binary(path, version_text(version), origin)


def _fetch(fetch: Callable[[Path], Path], origin: str, target: Path, report: Report) -> Binary:
    """`fetch` puts the executable into a scratch folder. It becomes `target` once it is accepted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        executable = fetch(Path(scratch))
        executable.chmod(0o755)
        version = _accept(executable, origin, report).version
        executable.replace(target)
    return Binary(target, version, origin)
