"""Which YAML file configures a run, and whether it says what its writer thinks it says.

A YAML reader keeps the last of two equal keys and drops the first without a word. So each file is
looked at before Snakemake reads it. Meaning is none of this module's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from serving.errors import OperatorError

CONFIG_FILE = Path("config/config.yaml")


def config_file_to_read(checkout: Path) -> Path | None:
    """The file of the working directory, else that of the checkout; None when it sets nothing.

    Raises OperatorError for a file that cannot be read or loses what it says.
    """
    for path in (CONFIG_FILE, checkout / CONFIG_FILE):
        if path.exists():
            return path if has_sections(path) else None
    return None


def has_sections(path: Path) -> bool:
    """Whether the file sets anything. Raises OperatorError, see `config_file_to_read`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise OperatorError(f"{path} cannot be read: {reason}", remedy="mend the file") from None
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as exc:
        raise _syntax_error(path, exc) from None
    finally:
        loader.dispose()
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in ("", "null", "~")):
        return False
    if not isinstance(root, yaml.MappingNode):
        raise OperatorError(
            f"{path} has no sections",
            remedy="write sections with keys, such as `router:` and below it `  policy: kv`; "
            "see config/README.md",
        )
    for key, first, second in _twice(root):
        raise OperatorError(
            f"{path} has `{key}` twice, in lines {first} and {second}",
            remedy="write it once, with everything that belongs to it: YAML forgets the first",
        )
    return True


def _twice(root: yaml.Node) -> Iterator[tuple[str, int, int]]:
    """Keys that a mapping has more than once, with the lines. Each anchored node is looked at once."""
    pending, seen = [root], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            pending.append(value)
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in lines:
                    yield key.value, lines[key.value], line
                lines[key.value] = line


def _syntax_error(path: Path, exc: yaml.YAMLError) -> OperatorError:
    mark = getattr(exc, "problem_mark", None)
    problem = getattr(exc, "problem", None) or str(exc)
    where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
    remedy = "mend that line, or the one before it"
    if "'\\t'" in problem:
        remedy = "indent with spaces: YAML takes no tabs"
    return OperatorError(f"{where}: {problem}", remedy=remedy)
