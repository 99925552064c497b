"""The JSON schema and the reference page of the configuration, made from its types.

`python -m serving.config.docs --write` renews `config/config.schema.json` and `config/README.md`.
`--check` fails when they differ from `serving.config`. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from serving.config import Config

INTRO = """\
# Configuration

Edit `config/config.yaml`. It needs only the keys that differ from the defaults below; an empty file
is fine. All keys are checked before anything starts. An unknown key, a value of the wrong type or
out of range, or two programs on one port ends the start with one line that names the key.

```yaml
workers:
  decode: 2
router:
  policy: round_robin
```

For one run, without editing the file:

```console
snakemake serve_disagg --config router-policy=round_robin
snakemake serve_disagg --config router='{policy: round_robin}' workers='{decode: 2}'
snakemake serve_disagg --configfile config/examples/disagg.yaml
```

Snakemake refuses dots in `--config` keys, so `section-key=value` stands for `section.key`. Such a
run changes the deployment like an edit of the file: programs whose settings changed restart, the
others keep running. `config/examples/` has one complete file for each topology and for CPU, one GPU
and two GPUs. Editors with support for JSON schemas complete keys from `config/config.schema.json`.

This page and the schema are generated from `scripts/serving/config/` by
`python -m serving.config.docs --write`.
"""


def render_schema() -> str:
    """`config/config.schema.json`, as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= msgspec.json.schema(Config)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def render_page() -> str:
    """`config/README.md`, as text: the introduction, then a table for each section."""
    definitions = msgspec.json.schema(Config)["$defs"]
    parts = [INTRO]
    for section in msgspec.structs.fields(Config):
        definition = definitions[section.type.__name__]
        parts.append(f"## {section.name}\n\n{definition['description']}\n")
        rows = [
            f"| `{key}` | {_kind(field)} | {_default(field['default'])} "
            f"| {_cell(field['description'])} |"
            for key, field in definition["properties"].items()
        ]
        table = ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows]
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def _kind(field: dict[str, Any]) -> str:
    """A field's type in a few words, with its bounds."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(_code(value) for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if "pattern" in field:
        longest = f", at most {field['maxLength']} characters" if "maxLength" in field else ""
        return f"string like `{field['pattern']}`{longest}"
    bounds = [
        f"{sign} {field[name]:g}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if name in field
    ]
    return " ".join([str(field["type"]), ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    return "none" if value is None else _code(value)


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def stale(folder: Path) -> list[Path]:
    """The generated files in `folder` that differ from the types."""
    return [
        path
        for path, text in _generated(folder).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def write(folder: Path) -> None:
    """Renew the generated files in `folder`."""
    for path, text in _generated(folder).items():
        path.write_text(text, encoding="utf-8")


def _generated(folder: Path) -> dict[Path, str]:
    return {folder / "config.schema.json": render_schema(), folder / "README.md": render_page()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.config.docs", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="renew the files")
    action.add_argument("--check", action="store_true", help="fail when they are out of date")
    parser.add_argument("--folder", type=Path, default=Path("config"), help="default: config")
    options = parser.parse_args(arguments)
    if options.write:
        write(options.folder)
        return 0
    outdated = stale(options.folder)
    for path in outdated:
        print(f"{path} is out of date: run `python -m serving.config.docs --write`")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
