"""Lets one text serve both readers, of the repository and of the built site.

Pages under docs/ link to source files as the repository has them (`../scripts/...`). mkdocs knows
only docs/, so this hook checks those links itself and leaves them as they are: the site is built
into site/ beside docs/, where the same path leads to the same file. README.md, CHANGELOG.md and
the generated config/README.md become pages of the site.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).parents[1]
INCLUDED = {
    "README.md": "index.md",
    "config/README.md": "reference.md",
    "CHANGELOG.md": "changes.md",
}
"""Files of the repository that are pages too, and the names of these pages."""

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in INCLUDED.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point each relative link at its page, or at its file in the repository."""
    name = page.file.src_uri
    source = {target: origin for origin, target in INCLUDED.items()}.get(name, f"docs/{name}")

    def replace(match: re.Match[str]) -> str:
        text, (path, _, anchor) = match.group(1), match.group(2).partition("#")
        if not path or "://" in path:
            return match.group(0)
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in INCLUDED or target.startswith("docs/"):
            inside = INCLUDED.get(target, target.removeprefix("docs/"))
            return f"[{text}]({inside}{'#' + anchor if anchor else ''})"
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which does not exist", source, path)
        return f'<a href="../{target}">{text}</a>'

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):  # commands are not prose
        parts += [_LINK.sub(replace, markdown[end : fence.start()]), fence.group(0)]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replace, markdown[end:])])
