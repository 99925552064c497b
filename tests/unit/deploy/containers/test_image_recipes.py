"""What images are made of: names, Dockerfiles, contexts, and what makes them anew."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from serving.config import Config, ContainerConfig, parse
from serving.deploy.containers import image_recipes
from serving.deploy.containers.image_recipes import (
    ServingImage,
    base_reference,
    build_command,
    build_context,
    conversion_commands,
    image_requirements,
    render_base,
    render_serving,
    serving_reference,
    with_built_image,
)
from serving.deploy.planning.source_digest import PACKAGE, SCRIPTS
from serving.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOLDEN = Path(__file__).parent / "golden"


def container(**raw: Any) -> ContainerConfig:
    return parse({"container": {"runtime": "docker", **raw}}).container


def config(backend: str = "tensorrt_llm", **raw: Any) -> Config:
    return parse({"engine": {"backend": backend}, "container": {"runtime": "podman", **raw}})


@pytest.mark.parametrize(
    ("raw", "reference"),
    [
        ({}, "nvcr.io/nvidia/tensorrt-llm/release:1.2.0"),
        ({"base_tag": "1.3.0rc13"}, "nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc13"),
        ({"base_image": "h:5000/x", "base_tag": "7"}, "h:5000/x:7"),
        ({"base_image": "h/x:own"}, "h/x:own"),
        ({"base_image": "h/x@sha256:1"}, "h/x@sha256:1"),
    ],
)
def test_base_is_the_release_image_or_the_one_that_is_given(
    raw: dict[str, Any], reference: str
) -> None:
    assert base_reference(container(**raw)) == reference
    assert not image_recipes.builds_base(container(**raw))


def test_base_from_source_is_named_by_commit_and_by_how_it_is_built() -> None:
    plain = base_reference(container(source_commit=COMMIT))
    assert plain.startswith("localhost/tensorrt-llm:0123456789ab-")
    assert image_recipes.builds_base(container(source_commit=COMMIT))
    restricted = container(source_commit=COMMIT, cuda_architectures="90-real")
    assert base_reference(restricted) != plain
    given = container(source_commit=COMMIT, base_image="h/x")
    assert not image_recipes.builds_base(given)


def test_dockerfile_of_the_base_is_exactly_this() -> None:
    made = render_base(
        container(source_commit=COMMIT, base_tag="1.2.0", cuda_architectures="90-real;100-real")
    )
    assert made == (GOLDEN / "base.Dockerfile").read_text(encoding="utf-8")
    assert "--cuda_architectures" not in render_base(container(source_commit=COMMIT))


def test_dockerfile_of_the_serving_image_is_exactly_this() -> None:
    made = render_serving("nvcr.io/nvidia/tensorrt-llm/release:1.2.0", container())
    assert made == (GOLDEN / "serving.Dockerfile").read_text(encoding="utf-8")


def test_change_of_this_project_repeats_no_installation() -> None:
    """A layer is built again with all that follow it, so the code comes after the packages."""
    lines = [
        line.split()
        for line in render_serving("base", container()).splitlines()
        if line.startswith(("FROM", "COPY", "RUN"))
    ]
    kinds = [line[0] for line in lines]
    assert kinds == ["FROM", "COPY", "RUN", "COPY"]
    assert lines[-1][1] == "scripts"
    assert "scripts" not in lines[1]


@pytest.mark.parametrize("backend", ["torch", "tensorrt_llm"])
def test_context_holds_what_the_dockerfile_copies_and_nothing_else(backend: str) -> None:
    names = {name for name, _ in build_context(backend)}
    copied = {"requirements.txt", "constraints.txt", "keep_base.py"}
    assert {name for name in names if not name.startswith("scripts/")} == copied
    assert "scripts/serving/worker/__main__.py" in names
    assert not any("__pycache__" in name for name in names)


@pytest.fixture
def changed_package(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "errors.py").write_text("# changed")
    return tmp_path / "package"


def test_image_is_named_by_its_content(changed_package: Path) -> None:
    name = serving_reference("FROM a", "torch")
    assert name == serving_reference("FROM a", "torch")
    assert name != serving_reference("FROM b", "torch")
    assert name != serving_reference("FROM a", "tensorrt_llm")
    assert name != serving_reference("FROM a", "torch", changed_package)


def test_an_image_is_built_again_when_its_content_changes(changed_package: Path) -> None:
    base, serving = (
        image_recipes.base_image_identity(config()),
        image_recipes.serving_image_identity(config()),
    )
    assert image_recipes.serving_image_identity(config(image="named", pull=True)) == serving
    assert image_recipes.base_image_identity(config(base_tag="1.1.0")) != base
    assert image_recipes.serving_image_identity(config(base_tag="1.1.0")) != serving
    assert image_recipes.serving_image_identity(config(), changed_package) != serving


def test_unset_image_means_what_was_built(tmp_path: Path) -> None:
    assert with_built_image(config(), tmp_path).container.image is None
    record = ServingImage(image="localhost/serving:1", detail="d", base="b", builder="podman")
    path = tmp_path / image_recipes.SERVING_RECORD
    path.write_bytes(msgspec.json.encode(record))
    assert with_built_image(config(), tmp_path).container.image == "localhost/serving:1"
    assert with_built_image(config(image="x"), tmp_path).container.image == "x"
    assert with_built_image(Config(), tmp_path) == Config()
    file = msgspec.structs.replace(record, file="results/images/serving-1.sif")
    path.write_bytes(msgspec.json.encode(file))
    assert with_built_image(config(), tmp_path).container.image == "results/images/serving-1.sif"


def test_builder_gets_the_limits_that_the_config_sets() -> None:
    plain = build_command("docker", container(), "i:1", Path("d"))
    assert plain == ["docker", "build", "--network=host", "--tag=i:1", "--file=d"]
    limited = build_command("podman", container(ulimits={"nofile": "1:1"}), "i:1", Path("d"))
    assert limited[-1] == "--ulimit=nofile=1:1"


@pytest.mark.parametrize(
    ("builder", "runtime", "commands"),
    [
        ("docker", "docker", []),
        ("docker", "apptainer", ["apptainer build --force r/s.sif docker-daemon:i:1"]),
        (
            "podman",
            "apptainer",
            [
                "podman save --format docker-archive --output r/s.tar i:1",
                "apptainer build --force r/s.sif docker-archive:r/s.tar",
            ],
        ),
        ("docker", "enroot", ["enroot import --output r/s.sqsh dockerd://i:1"]),
        ("podman", "enroot", ["enroot import --output r/s.sqsh podman://i:1"]),
    ],
)
def test_built_image_becomes_a_file_for_runtimes_that_run_files(
    builder: str, runtime: str, commands: list[str]
) -> None:
    file = Path("r/s.sqsh" if runtime == "enroot" else "r/s.sif")
    assert [" ".join(c) for c in conversion_commands(builder, runtime, "i:1", file)] == commands


def test_bad_architectures_never_reach_a_shell() -> None:
    with pytest.raises(ConfigError, match="cuda_architectures"):
        container(source_commit=COMMIT, cuda_architectures='90"; rm -rf /; "')


def test_every_package_is_ours_to_require_and_pinned() -> None:
    with (SCRIPTS.parent / "pyproject.toml").open("rb") as file:
        ours = tomllib.load(file)["project"]["dependencies"]
    required = {canonicalize_name(Requirement(line).name) for line in ours} | {"uvloop"}
    pins = {line.split("==")[0] for line in image_recipes.CONSTRAINTS.read_text().splitlines()}
    for name in image_requirements("torch"):
        assert canonicalize_name(name) in required, name
        assert name in pins, name


@pytest.mark.parametrize("backend", ["torch", "tensorrt_llm"])
def test_image_has_every_package_that_a_worker_imports(backend: str) -> None:
    """TensorRT-LLM's image brings what its own package requires."""
    brought = {"numpy", "torch", "transformers", "tokenizers", "safetensors", "tensorrt-llm"}
    brought |= {"pyyaml"}  # of huggingface_hub, which both need
    brought |= {"nvidia-ml-py"}  # or pynvml, the same module in older releases
    # torch's CUDA build brings triton, which only CUDA workers import.
    known = brought if backend == "tensorrt_llm" else {"pyyaml", "huggingface-hub", "triton"}
    # With another package of theirs: grpcio with etcd3aio, markupsafe with jinja2.
    known |= {"grpcio", "protobuf"}
    missing = (
        worker_imports(backend)
        - known
        - {canonicalize_name(n) for n in image_requirements(backend)}
    )
    assert not missing


def worker_imports(backend: str) -> set[str]:
    """Distributions whose modules are imported anywhere in what a worker with this engine runs."""
    unused = {"deploy", "frontend", "kv_router", "simulate", "text", "console.py"}
    theirs = {"torch": {"engine/trtllm", "engine/tensorrt_llm.py", "gpus.py"}}
    theirs["tensorrt_llm"] = {"engine/torch", "kv_transfer", "grammar"}
    distributions, found = packages_distributions(), set()
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] in unused or any(
            str(relative).startswith(folder) for folder in theirs[backend]
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in {"serving", "tensorrt_llm"}:
                    found.add(canonicalize_name(distributions.get(name, [name])[0]))
    return found
