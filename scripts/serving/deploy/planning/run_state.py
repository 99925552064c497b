"""Files of one Snakemake run, in `.snakemake/`, named after the process id of its main process.

Snakemake may start sub-processes for jobs, which parse the Snakefile again but with other targets
on their command line. They must see the deployment that the main process resolved. So the main
process writes it to a file, and a sub-process looks for the file of an ancestor. Scripts of rules
collect failures in a second file, for the main process to repeat at the end.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serving.config import ResolvedConfig

FOLDER = Path(".snakemake")


def failures_file() -> Path:
    """Where the rule scripts of this main process append the paragraphs of their failures."""
    return FOLDER / f"failures-{os.getpid()}"


def take_failures() -> list[str]:
    """The paragraphs collected so far; the file is removed."""
    path = failures_file()
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    path.unlink()
    return [paragraph for paragraph in text.split("\0") if paragraph]


def keep_for_subprocesses(config: ResolvedConfig) -> None:
    """Write the resolved configuration for sub-processes of this process, until it ends."""
    path = _config_file(os.getpid()).absolute()  # the working directory may be another at the end
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(config))
    temporary.replace(path)
    atexit.register(path.unlink, missing_ok=True)


def config_of_main_process() -> ResolvedConfig | None:
    """The configuration that an ancestor of this process kept; None when there is none."""
    for pid in _ancestors():
        path = _config_file(pid)
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=ResolvedConfig)
    return None


def _config_file(pid: int) -> Path:
    return FOLDER / f"resolved-{pid}.json"


def _ancestors() -> Iterator[int]:
    """Process ids from the parent up, without init."""
    pid = os.getppid()
    while pid > 1:
        yield pid
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        pid = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
