"""The container image of workers, built by podman on a base image that is made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from integration.containers.podman import TAG, limits, podman, usable_podman
from integration.deployment import Deployment
from serving.config import parse
from serving.deploy.containers import image_recipes
from serving.deploy.containers.image_build import build_serving, read_base
from serving.deploy.planning.source_digest import PACKAGE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BASE = f"localhost/serving-test-base:{TAG}"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with usable_podman(tmp_path_factory.mktemp("podman")):
        yield


@pytest.fixture(scope="module")
def base(runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with this machine's Python and pip in it."""
    root = tmp_path_factory.mktemp("root") / "base.tar"
    python = Path(os.path.realpath(sys.executable))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    pip = pytest.importorskip("pip")
    dynamic = [*stdlib.glob("lib-dynload/*.so"), python, Path("/bin/sh")]
    linked = subprocess.run(["ldd", *map(str, dynamic)], capture_output=True, text=True, check=True)
    libraries = {w for w in linked.stdout.split() if w.startswith("/") and not w.endswith(":")}
    # What the wheels of others are linked with.
    runtime_libraries = ("librt.so.1", "libpthread.so.0", "libdl.so.2", "libutil.so.1")
    runtime_libraries += ("libresolv.so.2", "libgcc_s.so.1", "libstdc++.so.6", "libnss_dns.so.2")
    [libc] = (Path(library) for library in libraries if library.endswith("/libc.so.6"))
    libraries |= {str(libc.parent / name) for name in runtime_libraries}
    certificates = os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt")
    with tarfile.open(root, "w", dereference=True) as tar:
        for file in (python, "/bin/sh", certificates, *sorted(libraries)):
            if Path(file).exists():
                tar.add(file)
        tar.add(stdlib, filter=without("site-packages", "dist-packages", "test", "__pycache__"))
        tar.add(Path(pip.__file__).parent, "/opt/pip/pip", filter=without("__pycache__"))
        for name in ("tmp", "etc", "root"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(folder)
    settings = {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "PYTHONPATH": "/opt/pip",
        "PIP_CERT": certificates,
        "LD_LIBRARY_PATH": str(stdlib.parent),
    }
    if index := os.environ.get("PIP_INDEX_URL"):
        settings["PIP_INDEX_URL"] = index
    changes = [f"--change=ENV {key}={value}" for key, value in settings.items()]
    podman("import", *changes, str(root), BASE)
    yield python.name
    podman("rmi", "--force", BASE, check=False)


def without(*names: str) -> Any:
    return lambda member: None if Path(member.name).name in names else member


def test_code_change_rebuilds_only_the_code_layer_of_an_image(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "runtime": "podman",
        "base_image": BASE.partition(":")[0],
        "base_tag": str(TAG),
        "python": base,
        "ulimits": limits(),
    }
    # The small set of packages: what TensorRT-LLM's image does not bring. Its engine needs no GPU
    # to be planned on the CPU.
    engine = {"backend": "tensorrt_llm", "device": "cpu"}
    deployment = Deployment(tmp_path / "built", container=settings, engine=engine)
    deployment.snakemake("build_image")
    folder = deployment.directory / "results" / "images"
    record = json.loads((folder / image_recipes.SERVING_RECORD).read_text())
    try:
        flags = [f"--ulimit={name}={value}" for name, value in limits().items()]
        program = "import serving.worker.__main__; print('imported')"
        output = podman(
            "run", "--rm", *flags, "--network=host", record["image"], base, "-c", program
        )
        assert "imported" in output
        assert "Nothing to be done" in deployment.snakemake("build_image").stdout

        package = tmp_path / "package"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        with (package / "errors.py").open("a") as file:
            file.write("# changed\n")
        lines: list[str] = []
        config = parse({"container": settings, "engine": engine})
        base_image = read_base(folder / image_recipes.BASE_RECORD)
        changed = build_serving(config, base_image, folder, lines.append, package=package)
        assert changed.image != record["image"]
        text = "\n".join(lines)
        assert text.count("Using cache") == 2, text  # the packages' list, and their installation
        assert "Collecting" not in text
        podman("rmi", "--force", changed.image)
    finally:
        podman("rmi", "--force", record["image"], check=False)
    assert msgspec.convert(record, image_recipes.ServingImage).builder == "podman"
