"""README and docs/: the site builds, and every link in them leads somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
HREF = re.compile(r"""(?:src|href)=["']?([^"' >]+)""")
REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//""")


def build(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stdout
    return out


def test_site_has_a_page_for_readme_configuration_and_each_document(site: Path) -> None:
    built = {path.name for path in site.glob("*.html")}
    documents = {path.stem + ".html" for path in (ROOT / "docs").glob("*.md")}
    assert documents | {"index.html", "reference.html", "changes.html"} <= built


def test_site_loads_nothing_from_the_network(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not REMOTE.search(page.read_text("utf-8")), page.name


def test_every_link_of_the_site_opens_from_its_folder(site: Path) -> None:
    """As files: pages lie in the site, and source files where `site/` is a folder of the checkout."""
    for page in set(site.glob("*.html")) - {site / "404.html"}:  # which only a server shows
        for link in HREF.findall(page.read_text("utf-8")):
            target = link.partition("#")[0].partition("?")[0]
            if not target or "://" in target or target.startswith(("data:", "javascript:")):
                continue
            place = ROOT / "docs" / target if target.startswith("../") else site / target
            assert place.exists(), f"{page.name}: {link}"


def test_a_dead_link_or_anchor_fails_the_build(tmp_path: Path) -> None:
    """On a copy of the site's sources, with one page broken in three ways."""
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    for name in ("docs", "config", "scripts", "rules", "envs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    (tmp_path / "docs").mkdir()
    for source in (ROOT / "docs").iterdir():
        (tmp_path / "docs" / source.name).symlink_to(source)
    page = tmp_path / "docs" / "install.md"
    text = page.read_text("utf-8")
    page.unlink()
    broken = "\n[a](models.md#nowhere) [b](nowhere.md) [c](../scripts/nowhere.py)\n"
    page.write_text(text + broken, "utf-8")
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    for target in ("#nowhere", "nowhere.md", "../scripts/nowhere.py"):
        assert target in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_of_the_repository(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_pages_name_exist(page: Path) -> None:
    """Also where they are no links: in diagrams and commands."""
    package = ROOT / "scripts" / "serving"
    folders = [ROOT, package, package / "frontend", ROOT / "tests" / "benchmarks"]
    named = re.findall(r"(?<![./\w])[a-z_/-]+\.py\b", page.read_text("utf-8"))
    assert not [name for name in named if not any((root / name).exists() for root in folders)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_that_pages_name_exist(page: Path) -> None:
    types = json.loads((ROOT / "config" / "config.schema.json").read_text("utf-8"))["$defs"]
    sections = {
        section: types[definition["$ref"].rpartition("/")[2]]["properties"]
        for section, definition in types["Config"]["properties"].items()
    }
    named = re.findall(rf"`({'|'.join(sections)})\.(?!py`)([a-z]\w*)[`:]", page.read_text("utf-8"))
    assert not [(section, key) for section, key in named if key not in sections[section]]


def test_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200
