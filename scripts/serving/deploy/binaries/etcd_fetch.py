"""Fetch etcd: the upstream release, pinned by checksum, or the distribution's package.

Both functions put files only into a scratch folder and return the executable in it. Whether it is
fit for use is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import httpx
from msgspec import Struct

from serving.deploy.binaries.binary import Unavailable
from serving.progress import Report

_APT_S = 180.0


class Release(Struct, frozen=True):
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


def fetch_release(release: Release, scratch: Path, report: Report) -> Path:
    """Download and unpack the tarball of this machine's architecture. Raises Unavailable."""
    arch = _ARCH.get(platform.machine())
    if platform.system() != "Linux" or arch is None or arch not in release.sha256:
        raise Unavailable(f"no pinned tarball for {platform.system()} {platform.machine()}")
    stem = f"etcd-v{release.version}-linux-{arch}"
    url = f"{release.url}/v{release.version}/{stem}.tar.gz"
    report(f"downloading {url}")
    tarball, executable = scratch / "etcd.tar.gz", scratch / "etcd"
    checksum = _download(url, tarball)
    if checksum != release.sha256[arch]:
        raise Unavailable(f"checksum of {url} is {checksum}, expected {release.sha256[arch]}")
    try:
        with tarfile.open(tarball) as archive:
            member = archive.extractfile(f"{stem}/etcd")
            if member is None:
                raise Unavailable(f"{stem}/etcd is not a file")
            with executable.open("wb") as out:
                shutil.copyfileobj(member, out)
    except (tarfile.TarError, KeyError) as exc:
        raise Unavailable(f"{url} cannot be unpacked: {exc}") from None
    return executable


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
        raise Unavailable(f"{url}: {str(exc).splitlines()[0] or type(exc).__name__}") from None
    return digest.hexdigest()


def fetch_debian_package(scratch: Path, report: Report) -> Path:
    """Unpack the distribution's etcd-server without installing it. apt checks its signature.

    Raises Unavailable.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise Unavailable("this is not a Debian or Ubuntu system")
    report("fetching the distribution's etcd-server package")
    # The package lands in a private folder, which apt's own user could not write to.
    options = ["-q", "-o", "APT::Sandbox::User=root"]
    try:
        _apt([*options, "download", "etcd-server"], scratch)
    except Unavailable:
        report("the package lists are missing or old; fetching them into a private folder")
        options += _private_lists(scratch)
        # Without this, apt only warns about lists that it could not fetch, and finds no package then.
        _apt([*options, "-o", "APT::Update::Error-Mode=any", "update"], scratch)
        _apt([*options, "download", "etcd-server"], scratch)
    package = next(scratch.glob("etcd-server_*.deb"), None)
    if package is None:
        raise Unavailable("apt-get download left no package")
    _run(["dpkg", "-x", str(package), "unpacked"], scratch)
    executable = scratch / "unpacked/usr/bin/etcd"
    if not executable.is_file():
        raise Unavailable(f"{package.name} has no usr/bin/etcd")
    return executable


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
    _run(["apt-get", *arguments], cwd)


def _run(command: list[str], cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_APT_S, check=True)
    except subprocess.CalledProcessError as exc:
        lines = (exc.stderr.strip() or exc.stdout.strip() or str(exc)).splitlines()
        # apt sums up at the end, and names the cause before.
        reason = next((line for line in lines if "Failed to fetch" in line), lines[-1])
        raise Unavailable(f"{' '.join(command[:1])}: {reason}") from None
    except (OSError, subprocess.SubprocessError) as exc:
        raise Unavailable(str(exc)) from None
