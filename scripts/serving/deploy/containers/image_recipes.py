"""What the images of `build_image` are made of: Dockerfiles, build contexts and names.

There are two images: the base with TensorRT-LLM in it, and the serving image on top with what this
project needs. This module decides their content from the config; `image_build` runs the builder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from serving.config import Config, ContainerConfig
from serving.deploy.containers.image_store import IMAGES
from serving.deploy.planning.source_digest import PACKAGE, SCRIPTS

RELEASE = "nvcr.io/nvidia/tensorrt-llm/release"
DEVEL = "nvcr.io/nvidia/tensorrt-llm/devel"
SOURCE = "https://github.com/NVIDIA/TensorRT-LLM.git"
TEMPLATES = SCRIPTS.parent / "envs" / "containers"
CONSTRAINTS = SCRIPTS.parent / "envs" / "constraints.txt"
BASE_RECORD, SERVING_RECORD = "base.json", "serving.json"
WORKER_PACKAGES = ("etcd3aio", "msgspec", "nats-py", "psutil", "uvloop", "xxhash")
"""What every worker imports. TensorRT-LLM's own image brings torch, transformers and the like."""
TORCH_PACKAGES = (
    *("accelerate", "gguf", "jinja2", "llguidance", "numpy"),
    *("safetensors", "sentencepiece", "tokenizers", "torch", "transformers", "ucxx-cu13"),
)
MOCK_PACKAGES = ("numpy", "tokenizers")


class BaseImage(Struct, frozen=True, kw_only=True):
    """`results/images/base.json`. `reference` is what the serving image starts `FROM`."""

    reference: str
    detail: str  # id and digest, as the builder reports them
    builder: str


class ServingImage(Struct, frozen=True, kw_only=True):
    """`results/images/serving.json`. `file` is what apptainer and enroot run, empty for others."""

    image: str
    detail: str
    base: str
    builder: str
    file: str = ""


def with_built_image(config: Config, images: Path = IMAGES) -> Config:
    """When `container.image` is unset, use the image that `build_image` made, if there is one."""
    container = config.container
    if container.runtime == "none" or container.image is not None:
        return config
    try:
        built = msgspec.json.decode((images / SERVING_RECORD).read_bytes(), type=ServingImage)
    except (OSError, msgspec.MsgspecError):
        return config
    return replace(config, container=replace(container, image=built.file or built.image))


def base_reference(container: ContainerConfig) -> str:
    """Name of the base image: given, built from source, or the official release."""
    if container.base_image is not None:
        named = container.base_image
        return named if _has_tag(named) else f"{named}:{container.base_tag}"
    if container.source_commit is None:
        return f"{RELEASE}:{container.base_tag}"
    return (
        f"localhost/tensorrt-llm:{container.source_commit[:12]}-{_digest(render_base(container))}"
    )


def builds_base(container: ContainerConfig) -> bool:
    """Whether TensorRT-LLM is compiled here."""
    return container.base_image is None and container.source_commit is not None


def render_base(container: ContainerConfig) -> str:
    """The Dockerfile that builds TensorRT-LLM from `source_commit`."""
    return _render(
        "base.Dockerfile",
        devel=f"{DEVEL}:{container.base_tag}",
        commit=container.source_commit,
        cuda_architectures=container.cuda_architectures,
    )


def render_serving(base: str, container: ContainerConfig) -> str:
    """The Dockerfile of the serving image."""
    return _render("serving.Dockerfile", base=base, python=container.python)


def image_requirements(backend: str) -> tuple[str, ...]:
    """Packages the serving image must have; their versions come from the constraints."""
    extra = {"torch": TORCH_PACKAGES, "mock": MOCK_PACKAGES}.get(backend, ())
    return tuple(sorted({*WORKER_PACKAGES, *extra}))


def build_context(backend: str, package: Path = PACKAGE) -> Iterator[tuple[str, bytes]]:
    """Every file of the serving image's build context, by its path in it. `package` is our code."""
    yield "requirements.txt", "".join(f"{name}\n" for name in image_requirements(backend)).encode()
    yield "constraints.txt", CONSTRAINTS.read_bytes()
    yield "keep_base.py", (TEMPLATES / "keep_base.py").read_bytes()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(Path("scripts/serving") / path.relative_to(package)), path.read_bytes()


def serving_reference(dockerfile: str, backend: str, package: Path = PACKAGE) -> str:
    """A name made of the content: when it changes, the programs that run the image restart."""
    digest = hashlib.sha256(dockerfile.encode())
    for name, content in build_context(backend, package):
        digest.update(f"\0{name}\0".encode() + content)
    return f"localhost/serving:{digest.hexdigest()[:12]}"


def serving_image_identity(config: Config, package: Path = PACKAGE) -> str:
    """What the serving image depends on, as text for a rule: it is built again when this changes."""
    container = config.container
    serving = render_serving(base_reference(container), container)
    name = serving_reference(serving, config.engine.backend, package)
    return json.dumps([container.runtime, name])


def base_image_identity(config: Config) -> str:
    """The same for the base image, which does not depend on the code of this project."""
    return json.dumps([config.container.runtime, base_reference(config.container)])


def build_command(
    builder: str, container: ContainerConfig, image: str, dockerfile: Path
) -> list[str]:
    """The builder's command line, without the context, which comes last."""
    limits = (container.ulimits or {}).items()
    return [
        *(builder, "build", "--network=host", f"--tag={image}", f"--file={dockerfile}"),
        *(f"--ulimit={name}={value}" for name, value in limits),
    ]


def conversion_commands(builder: str, runtime: str, image: str, file: Path) -> list[list[str]]:
    """How a built image becomes the file that apptainer or enroot runs; empty for the others."""
    if runtime == "enroot":
        scheme = {"docker": "dockerd", "podman": "podman"}[builder]
        return [["enroot", "import", "--output", str(file), f"{scheme}://{image}"]]
    if runtime != "apptainer":
        return []
    if builder == "docker":
        return [["apptainer", "build", "--force", str(file), f"docker-daemon:{image}"]]
    archive = str(file.with_suffix(".tar"))
    return [
        ["podman", "save", "--format", "docker-archive", "--output", archive, image],
        ["apptainer", "build", "--force", str(file), f"docker-archive:{archive}"],
    ]


def _render(template: str, **values: str | None) -> str:
    import jinja2  # most runs of the workflow build nothing

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(template).render(**values)


def _has_tag(reference: str) -> bool:
    return "@" in reference or ":" in reference.rpartition("/")[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
