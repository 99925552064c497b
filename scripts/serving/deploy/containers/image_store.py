"""Find the image on this machine, and pull it.

A pull records the digest of the reference. A later pull fetches that digest again, even when the
tag has moved. apptainer and enroot run files that are made from a reference.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from serving.config import ContainerConfig
from serving.deploy.checks.findings import Finding
from serving.deploy.containers.runtime import ASK_S, ask, complaint, run, stream
from serving.progress import Report

IMAGES = Path("results/images")
PINNED = "pinned.json"
"""`{reference: digest}` of what was pulled here. Delete an entry to follow its tag again."""
_SUFFIXES = {"apptainer": ".sif", "enroot": ".sqsh"}
_SCHEME = "docker://"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def local_name(container: ContainerConfig) -> str | None:
    """What to run: for apptainer and enroot, the file that a `docker://` reference is made into."""
    image, suffix = container.image, _SUFFIXES.get(container.runtime)
    if image is None or suffix is None or not image.startswith(_SCHEME):
        return image
    name = re.sub(r"[^\w.-]+", "-", image.removeprefix(_SCHEME))
    return str(IMAGES / f"{name}{suffix}")


def find_image(container: ContainerConfig) -> Finding:
    """Is the image here? The detail names its digest. Never downloads: a start must not hang."""
    image, runtime = local_name(container), container.runtime
    if image is None:
        return Finding(
            "image",
            False,
            "container.image is not set, and no image was built here",
            "set it to an image, or build one: `snakemake build_image`",
        )
    if runtime in ("docker", "podman"):
        return _inspect(runtime, image)
    if Path(image).exists():
        return Finding("image", True, image)
    if runtime == "enroot" and "/" not in image:
        if image in run(["enroot", "list"], ASK_S)[1].split():
            return Finding("image", True, image)
        return Finding(
            "image", False, f"enroot has no container {image}", _fetch_hint(container, image)
        )
    return Finding("image", False, f"there is no file {image}", _fetch_hint(container, image))


def pull_image(container: ContainerConfig, report: Report, images: Path = IMAGES) -> Finding:
    """Fetch the image while reporting the runtime's progress, then find it."""
    assert container.image is not None
    reference, runtime = container.image, container.runtime
    pins = read_pins(images)
    report(f"{runtime}: fetching {reference}")
    images.mkdir(parents=True, exist_ok=True)
    for command in pull_commands(container, pins.get(reference)):
        code, text = stream(command, report)
        if code != 0:
            return complaint("image", command, code, text, reference)
    found = find_image(container)
    if found.ok and (digest := _DIGEST.search(found.detail)):
        pins[reference] = digest.group()
        (images / PINNED).write_bytes(msgspec.json.format(msgspec.json.encode(pins), indent=2))
    return found


def pull_commands(container: ContainerConfig, digest: str | None) -> list[list[str]]:
    """How to get `container.image`, or exactly `digest` of it under that name. Pure."""
    assert container.image is not None
    reference, runtime = container.image.removeprefix(_SCHEME), container.runtime
    exact = f"{_untagged(reference)}@{digest}" if digest else reference
    if runtime in ("docker", "podman"):
        tag = [[runtime, "tag", exact, reference]] if digest else []
        return [[runtime, "pull", exact], *tag]
    target = local_name(container) or ""
    if runtime == "apptainer":
        return [["apptainer", "pull", target, f"{_SCHEME}{exact}"]]
    host, slash, path = exact.partition("/")
    source = f"{host}#{path}" if slash and "." in host else exact
    return [["enroot", "import", "--output", target, f"{_SCHEME}{source}"]]


def read_pins(images: Path = IMAGES) -> dict[str, str]:
    try:
        return msgspec.json.decode((images / PINNED).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def _inspect(runtime: str, image: str) -> Finding:
    """The detail has the image's id, and its digest in the registry if it has one."""
    command = [runtime, "image", "inspect", "--format", "{{.Id}} {{.RepoDigests}}", image]
    finding = ask("image", command, image=image)
    if finding.ok:
        own, _, known = finding.detail.partition(" ")
        digests = _DIGEST.findall(known)
        where = f" {digests[0]}" if digests else ""
        return Finding("image", True, f"{image} {own.removeprefix('sha256:')[:12]}{where}")
    remedy = f"`{runtime} pull {image}`, set container.pull to true, or name another image"
    return Finding("image", False, finding.detail, remedy)


def _fetch_hint(container: ContainerConfig, image: str) -> str:
    if container.image != image:
        return "set container.pull to true, so that it is fetched"
    how = {
        "apptainer": "apptainer pull image.sif docker://REFERENCE",
        "enroot": "enroot import -o image.sqsh docker://REFERENCE",
    }[container.runtime]
    return f"`{how}`, then set container.image to the file; or run `snakemake build_image`"


def _untagged(reference: str) -> str:
    """Without tag or digest; a colon before the last slash belongs to the registry's port."""
    reference = reference.partition("@")[0]
    head, slash, last = reference.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
