"""What the end of a test run says about tests that were skipped for want of a tool."""

from __future__ import annotations

from pathlib import Path

import pytest
from missing_tools import IPROUTE2, PODMAN, SLURM, Tool, install_commands, skip_without

ROOT = Path(__file__).parents[3]


def test_all_reasons_become_one_line_that_names_each_package_once() -> None:
    reasons = [
        "Skipped: podman: podman not found; apt-get install podman runc",
        "Skipped: podman: podman not found; apt-get install podman runc",
        "Skipped: iproute2: ip not found; apt-get install iproute2",
        "Skipped: NIXL is not installed; pip install nixl-cu13",
        "needs a CUDA GPU",
    ]
    line = install_commands(reasons)
    assert line == "apt-get install iproute2 podman runc; pip install nixl-cu13"


def test_reasons_that_no_package_removes_give_no_line() -> None:
    assert install_commands(["needs a CUDA GPU", "this kernel has no netem"]) == ""


def test_missing_program_skips_and_names_the_packages(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception) as skipped:
        skip_without(Tool("Slurm", ["sh", "slurmd"], "slurm-wlm munge"), str(tmp_path))
    assert install_commands([str(skipped.value)]) == "apt-get install munge slurm-wlm"


def test_present_program_does_not_skip() -> None:
    skip_without(Tool("shell", ["sh"], "dash"))


def test_readme_installs_every_tool_that_tests_are_skipped_without() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for tool in (IPROUTE2, PODMAN, SLURM):
        for package in tool.packages.split():
            assert package in readme.split("<!-- test tools -->")[1].split("```")[1].split()


def test_summary_of_a_run_with_skipped_tests_says_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    pytester.makepyfile(
        """
        import pytest

        def test_skipped():
            pytest.skip("podman: podman not found; apt-get install podman runc")
        """
    )
    done = pytester.runpytest_subprocess("-p", "missing_tools", "-p", "no:cacheprovider")
    [line] = [line for line in done.outlines if line.startswith("To run the skipped tests")]
    assert line.endswith("apt-get install podman runc")
