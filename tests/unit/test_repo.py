"""What the repository looks like from outside."""

import ast
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {
    "Snakefile",
    "rules",
    "scripts",
    "config",
    "docs",
    "envs",
    "tests",
    "README.md",
    "mkdocs.yml",
    "pyproject.toml",
    "profiles",
    ".ci",
    "CHANGELOG.md",
    "LICENSE",
    ".gitignore",
}


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


RECORDED = {"tests/unit/engine/torch/weights/quantized/recorded.safetensors"}
"""What other libraries made, for tests to compare with."""


def test_top_level_holds_exactly_what_the_layout_names() -> None:
    assert {name.split("/")[0] for name in tracked()} == TOP_LEVEL


def test_no_artefact_is_tracked() -> None:
    suffixes = (".safetensors", ".gguf", ".bin", ".whl", ".pyc", ".sock", ".log")
    artefacts = {name for name in tracked() if name.endswith(suffixes)}
    assert artefacts <= RECORDED


def test_every_module_and_rule_script_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "scripts").rglob("*.py")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not silent


def test_changelog_has_unreleased_and_the_packaged_version() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    headings = [line.removeprefix("## ").split(" ")[0] for line in lines if line.startswith("## ")]
    version = project()["version"]
    assert headings[0] == "Unreleased"
    assert version in headings[1:]


def test_licence_is_the_one_that_is_declared() -> None:
    assert project()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_readme_marks_its_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- run -->") == readme.count("<!-- test -->") == 1
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)["project"]
    return content


def requirements(*, test: bool) -> list[Requirement]:
    found = project()
    texts = [*found["dependencies"], *(found["optional-dependencies"]["test"] if test else [])]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, str]:
    lines = (ROOT / "envs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements(test=True):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), requirement


def test_torch_pin_is_the_cpu_one_and_range_admits_older_cuda_builds() -> None:
    (torch,) = (r for r in requirements(test=False) if r.name == "torch")
    assert pins()["torch"] == "2.13.0"
    assert torch.specifier.contains("2.11.0")


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda p: p.stem)
def test_conda_environment_agrees_with_the_pins(path: Path) -> None:
    """Each pins Python, and every package at the version of the constraints."""
    environment = yaml.safe_load(path.read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert any(entry.startswith("python =3.1") for entry in conda)
    pinned = pins()
    for line in pip["pip"]:
        if not line.startswith("--"):
            requirement = Requirement(line)
            version = pinned[canonicalize_name(requirement.name)]
            assert str(requirement.specifier) == f"=={version}", line


def test_serving_environment_has_everything_the_package_requires() -> None:
    environment = yaml.safe_load((ROOT / "envs" / "serving.yaml").read_text(encoding="utf-8"))
    lines = environment["dependencies"][-1]["pip"]
    present = {canonicalize_name(Requirement(x).name) for x in lines if not x.startswith("--")}
    needed = {canonicalize_name(r.name) for r in requirements(test=False)}
    assert needed <= present
