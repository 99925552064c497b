"""Test code. Puts the stand-in where a deployment finds it: a package, its metadata, its tools.

root = install(tmp_path / "trtllm", "1.2.1")
env["PYTHONPATH"] = f"{root}:..."; env["PATH"] = f"{root / 'bin'}:..."
config["tensorrt_llm"]["examples_dir"] = str(root / "examples")
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAMILIES = ("llama", "qwen", "phi", "gpt", "gemma", "mixtral")
"""Folders of `examples/models/core` that get a `convert_checkpoint.py`."""

_SCRIPT = """#!{python}
# Test code: stands in for a tool of TensorRT-LLM.
from {module} import main

main()
"""


def install(target: Path, version: str) -> Path:
    """Make `target`, a folder for PYTHONPATH with the stand-in as `version`. Returns it.

    `target/bin` (for PATH) and `target/examples` have the tools of versions up to 1.2. Raises
    ValueError for a version that contract.json does not cover.
    """
    contract = load_contract()
    if version not in contract.versions():
        raise ValueError(f"{version} is none of {', '.join(contract.versions())}")
    package = target / "tensorrt_llm"
    shutil.copytree(
        HERE / "tensorrt_llm", package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    for name in ("contract.json", "versions.json"):
        shutil.copyfile(HERE / name, package / name)
    (package / "installed-version").write_text(f"{version}\n")
    metadata = target / f"tensorrt_llm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n"
        "Summary: Test code that stands in for TensorRT-LLM\n"
    )
    (metadata / "INSTALLER").write_text("standin\n")
    (metadata / "RECORD").write_text("")
    if "TrtLlmArgs" in contract.classes(version):
        _write_script(target / "bin" / "trtllm-build", "tensorrt_llm.commands.build")
        for family in FAMILIES:
            script = target / "examples" / "models" / "core" / family / "convert_checkpoint.py"
            _write_script(script, "tensorrt_llm.commands.convert_checkpoint")
    else:
        shutil.rmtree(package / "_tensorrt_engine")
        shutil.rmtree(package / "commands")
    return target


def load_contract() -> Any:
    """The package's module that reads the contract, without importing the package."""
    spec = importlib.util.spec_from_file_location(
        "standin_contract", HERE / "tensorrt_llm" / "_contract.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _write_script(path: Path, module: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_SCRIPT.format(python=sys.executable, module=module))
    path.chmod(0o755)
