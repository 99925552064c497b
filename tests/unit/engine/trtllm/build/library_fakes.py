"""A `RunProgram` that answers like the library's tools, and records what it was asked to run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from serving.engine.trtllm.build.installed import _MARK
from serving.progress import Report

Answer = Callable[[list[str]], tuple[int, str]]


class FakeRun:
    """Answers the probe with `version`; every other command goes to `answer`."""

    def __init__(self, version: str = "1.2.1", answer: Answer | None = None) -> None:
        self.version, self.answer = version, answer or tools
        self.commands: list[list[str]] = []

    def __call__(
        self, argv: list[str], *, report: Report | None = None
    ) -> subprocess.CompletedProcess[str]:
        if argv[1] == "-c":
            said = f"a banner\n{_MARK}{json.dumps([self.version, '13.0'])}\n"
            return subprocess.CompletedProcess(argv, 0, said, "")
        self.commands.append(argv)
        code, said = self.answer(argv)
        for line in said.splitlines():
            if report is not None:
                report(line)
        return subprocess.CompletedProcess(argv, code, said, "")


def flags(argv: list[str]) -> dict[str, str]:
    """`--name value` pairs; the value of a switch is empty."""
    found, name = {}, ""
    for part in argv:
        if part.startswith("--"):
            name, found[part] = part, ""
        elif name:
            assert not found[name], f"{name} has two values"
            found[name] = part
    return found


def tools(argv: list[str]) -> tuple[int, str]:
    """convert_checkpoint.py and trtllm-build, as far as files go."""
    given = flags(argv)
    output = Path(given["--output_dir"])
    output.mkdir()
    if argv[0] == "trtllm-build":
        ranks = json.loads((Path(given["--checkpoint_dir"]) / "config.json").read_text())["ranks"]
        for rank in range(ranks):
            (output / f"rank{rank}.engine").write_text("engine")
    else:
        ranks = int(given["--tp_size"]) * int(given["--pp_size"])
    (output / "config.json").write_text(json.dumps({"ranks": ranks}))
    return 0, "doing\ndone\n"
