"""The matrix as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.models.row import Result, Row


def table(results: Sequence[tuple[Row, Result]]) -> str:
    lines = [
        "| model | form | verdict | KV a token, bfloat16 | why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, result in results:
        memory = f"{result.kv_bytes / 1024:.1f} KiB" if result.kv_bytes else ""
        note = result.note.removeprefix("the torch engine cannot run this model: ")
        lines.append(f"| {row.name} | {row.form} | {result.verdict} | {memory} | {note} |")
    return "\n".join(lines)
