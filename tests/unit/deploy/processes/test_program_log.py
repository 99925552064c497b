"""The end of a program's log, as it is quoted to a person."""

from __future__ import annotations

from pathlib import Path

from serving.deploy.processes.program_log import LINE_CHARS, TAIL_BYTES, ProgramLog


def test_long_lines_and_long_logs_are_quoted_in_part(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    log = ProgramLog(path)
    path.write_text("x" * (2 * TAIL_BYTES) + "\n" + "y" * 100_000 + "\nthe reason\n")
    error = str(log.startup_failure("worker", "exit status 1"))
    assert len(error) < 4 * LINE_CHARS
    assert "more characters" in error
    assert "  | the reason" in error
