"""The matrix as a page of tables, one for each kind of rows."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from benchmarks.models.all_rows import KINDS
from benchmarks.models.row import Result, Row
from serving.engine.torch.weights.supported import model_class_of
from serving.engine.trtllm.build.checkpoint import ARCHITECTURES

PAGE = Path(__file__).parents[3] / "docs" / "supported-models.md"
BEGIN, END = "<!-- model matrix: begin -->", "<!-- model matrix: end -->"
HEAD = (
    "| model | architecture | checkpoint | torch engine | KV a token | TensorRT-LLM | why |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
_NOISE = re.compile(r"^the torch engine (?:cannot|would not) [^:]*: |/\S*/(?=\S*)")
_FOLDER = re.compile(r"\S*/\.engine\.building\b|\S*/fetched\b|\S*/model\b(?!\.)")

Key = tuple[str, str]
"""A row's name and form, of which the matrix has each pair once."""


def key_of(row: Row) -> Key:
    return row.name, row.form


def line(row: Row, result: Result) -> str:
    memory = f"{result.kv_bytes / 1024:.1f} KiB" if result.kv_bytes else ""
    cells = [row.name, architecture(row), row.form, result.verdict, memory]
    return f"| {' | '.join([*cells, on_tensorrt_llm(row), reason(result)])} |"


def architecture(row: Row) -> str:
    found = model_class_of(row.config)
    return f"`{found.__name__}`" if found else f"`{row.model_type}`"


def on_tensorrt_llm(row: Row) -> str:
    """The release whose documentation first lists the architecture; for GGUF there is none."""
    release = ARCHITECTURES.get(architecture(row).strip("`"))
    return "" if release is None or row.form.startswith("GGUF") else f"{release[0]}.{release[1]}"


def reason(result: Result) -> str:
    """Without the folders of this run, and without what every reason begins with."""
    note = _FOLDER.sub("the checkpoint", result.note)
    return _NOISE.sub("", note).replace("|", "\\|")


def tables(lines: Mapping[Key, str]) -> str:
    """Rows that have no line are left out."""
    parts: list[str] = []
    for title, rows in KINDS.items():
        found = [lines[key_of(row)] for row in rows if key_of(row) in lines]
        if found:
            parts += [f"## {title}", "", *HEAD, *found, ""]
    return "\n".join(parts)


def table(results: Sequence[tuple[Row, Result]]) -> str:
    return "\n".join([*HEAD, *(line(row, result) for row, result in results)])


def written(page: str) -> dict[Key, str]:
    """The lines of a page by their rows."""
    found: dict[Key, str] = {}
    inside = page.partition(BEGIN)[2].partition(END)[0]
    for text in inside.splitlines():
        cells = [cell.strip() for cell in text.strip("|").split(" | ")]
        if text.startswith("| ") and text not in HEAD and len(cells) >= 6:
            found[cells[0], cells[2]] = text
    return found


def is_current(row: Row, lines: Mapping[Key, str]) -> bool:
    """Whether the page has a line for the row that ends as it should."""
    return f"| {row.expected} |" in lines.get(key_of(row), "")


def update(page: str, results: Sequence[tuple[Row, Result]]) -> str:
    """The page with these results; lines of rows that did not run stay as they are."""
    lines = written(page) | {key_of(row): line(row, result) for row, result in results}
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "transformers", "tokenizers", "gguf")
    )
    stamp = f"Last run on {date.today()}, on CPU ({platform.machine()}), with {versions}."
    return f"{before}{BEGIN}\n\n{stamp}\n\n{tables(lines)}\n{END}{after}"
