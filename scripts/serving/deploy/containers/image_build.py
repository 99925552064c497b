"""Build the images: the base with TensorRT-LLM in it, then the serving image on top.

Dockerfiles and names come from `image_recipes`. docker or podman builds; for apptainer and enroot
the built image is converted into a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from serving.config import Config, ContainerConfig
from serving.deploy.containers import image_recipes, image_store
from serving.deploy.containers.image_recipes import BaseImage, ServingImage
from serving.deploy.containers.runtime import ask, complaint, run, stream
from serving.deploy.planning.source_digest import PACKAGE
from serving.errors import OperatorError
from serving.progress import Report

BUILDERS = ("docker", "podman")
SOURCE_DISK_BYTES = 63 * 10**9
"""TensorRT-LLM's documentation on building from source; for the image and all it is made of."""
ASK_S = 30.0
_STORAGE = {"docker": "{{.DockerRootDir}}", "podman": "{{.Store.GraphRoot}}"}


def build_base(config: Config, folder: Path, report: Report) -> BaseImage:
    """Build or fetch the base image, and record it in `folder/base.json`.

    Raises OperatorError: no builder, no git-lfs, no disk space, no access to the registry.
    """
    container, builder = config.container, choose_builder(config.container)
    reference = image_recipes.base_reference(container)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = replace(container, runtime=builder, image=reference)
    found = image_store.find_image(wanted)
    if image_recipes.builds_base(container):
        assert container.source_commit is not None
        if not found.ok:
            _require_for_source(builder, folder)
            checkout = fetch_source(container.source_commit, folder / "tensorrt-llm", report)
            dockerfile = folder / "base.Dockerfile"
            dockerfile.write_text(image_recipes.render_base(container))
            _build(builder, container, reference, dockerfile, checkout, report)
            found = image_store.find_image(wanted)
    elif not found.ok:
        found = image_store.pull_image(wanted, report, folder)
    if not found.ok:
        raise OperatorError(
            f"the base image {reference} is not available: {found.detail}", remedy=found.remedy
        )
    base = BaseImage(reference=reference, detail=found.detail, builder=builder)
    _write(folder / image_recipes.BASE_RECORD, base)
    return base


def build_serving(
    config: Config, base: BaseImage, folder: Path, report: Report, *, package: Path = PACKAGE
) -> ServingImage:
    """Build the serving image on `base` with the code in `package`, and record it.

    The record is `folder/serving.json`. Raises OperatorError when the builder fails.
    """
    container, backend, builder = config.container, config.engine.backend, base.builder
    text = image_recipes.render_serving(base.reference, container)
    image = image_recipes.serving_reference(text, backend, package)
    dockerfile, context = folder / "serving.Dockerfile", folder / "context"
    dockerfile.write_text(text)
    shutil.rmtree(context, ignore_errors=True)
    for name, content in image_recipes.build_context(backend, package):
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    _build(builder, container, image, dockerfile, context, report)
    found = image_store.find_image(replace(container, runtime=builder, image=image))
    suffix = {"apptainer": ".sif", "enroot": ".sqsh"}.get(container.runtime, "")
    file = folder / f"serving-{image.rpartition(':')[2]}{suffix}" if suffix else None
    if file is not None:
        _convert(builder, container.runtime, image, file, report)
    serving = ServingImage(
        image=image,
        detail=found.detail,
        base=base.detail,
        builder=builder,
        file=str(file) if file is not None else "",
    )
    _write(folder / image_recipes.SERVING_RECORD, serving)
    return serving


def choose_builder(container: ContainerConfig) -> str:
    """The runtime itself, or the first of docker and podman that works. Raises OperatorError."""
    runtime = container.runtime
    candidates = (runtime,) if runtime in BUILDERS else BUILDERS
    problems = []
    for builder in candidates:
        if shutil.which(builder) is None:
            problems.append(f"{builder} is not on PATH")
            continue
        usable = ask("builder", [builder, "info"])
        if usable.ok:
            return builder
        problems.append(usable.detail)
    raise OperatorError(
        f"no image can be built here: {'; '.join(problems)}",
        remedy="install docker or podman, or build on another machine and set container.image to the "
        "image or to the file made of it",
    )


def fetch_source(commit: str, checkout: Path, report: Report) -> Path:
    """A checkout of TensorRT-LLM at `commit` with its submodules and LFS files."""
    for command in source_commands(commit, checkout):
        code, text = stream(command, report)
        if code != 0:
            raise OperatorError(
                f"the source of TensorRT-LLM at {commit} cannot be fetched: {text}",
                remedy="check container.source_commit, and that this machine reaches GitHub; "
                f"a checkout may also be put at {checkout} by hand",
            )
    return checkout


def source_commands(commit: str, checkout: Path) -> list[list[str]]:
    """Only that commit. Running them again goes on where they stopped."""
    git = ["git", "-C", str(checkout)]
    return [
        ["git", "init", "--quiet", str(checkout)],
        [*git, "config", "remote.origin.url", image_recipes.SOURCE],
        [*git, "lfs", "install", "--local"],
        [*git, "fetch", "--depth", "1", "origin", commit],
        [*git, "checkout", "--quiet", "--force", commit],
        [*git, "submodule", "update", "--init", "--recursive", "--depth", "1"],
        [*git, "lfs", "pull"],
    ]


def _require_for_source(builder: str, folder: Path) -> None:
    if run(["git", "lfs", "version"], ASK_S)[0] != 0:
        raise OperatorError(
            "git-lfs is missing, and TensorRT-LLM keeps libraries in it that its build links",
            remedy="`apt-get install git git-lfs`, or unset container.source_commit to use the "
            "release image",
        )
    code, storage = run([builder, "info", "--format", _STORAGE[builder]], ASK_S)
    folders = {str(folder), *([storage] if code == 0 and Path(storage).is_dir() else [])}
    for disk in sorted(folders):
        free = shutil.disk_usage(disk).free
        if free < SOURCE_DISK_BYTES:
            raise OperatorError(
                f"{free / 1e9:.0f} GB are free at {disk}, and building TensorRT-LLM takes "
                f"{SOURCE_DISK_BYTES / 1e9:.0f} GB",
                remedy=f"free some (`{builder} system prune`), move that folder to a larger disk, "
                "or unset container.source_commit to use the release image",
            )


def _build(
    builder: str,
    container: ContainerConfig,
    image: str,
    dockerfile: Path,
    context: Path,
    report: Report,
) -> None:
    command = [*image_recipes.build_command(builder, container, image, dockerfile), str(context)]
    report(" ".join(command))
    code, text = stream(command, report)
    if code != 0:
        finding = complaint("build", command, code, text, image)
        raise OperatorError(f"{image} cannot be built: {finding.detail}", remedy=finding.remedy)


def _convert(builder: str, runtime: str, image: str, file: Path, report: Report) -> None:
    file.unlink(missing_ok=True)  # enroot refuses to overwrite
    commands: Sequence[list[str]] = image_recipes.conversion_commands(builder, runtime, image, file)
    try:
        for command in commands:
            report(" ".join(command))
            code, text = stream(command, report)
            if code != 0:
                finding = complaint("convert", command, code, text, image)
                raise OperatorError(
                    f"{image} cannot be made into {file}: {finding.detail}", remedy=finding.remedy
                )
    finally:
        file.with_suffix(".tar").unlink(missing_ok=True)


def _write(path: Path, record: BaseImage | ServingImage) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    temporary.replace(path)


def read_base(path: Path) -> BaseImage:
    """The record of the first step. Raises OperatorError when it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BaseImage)
    except (OSError, msgspec.MsgspecError) as exc:
        raise OperatorError(
            f"{path} is not a record of a base image: {exc}", remedy="delete it and build again"
        ) from None
