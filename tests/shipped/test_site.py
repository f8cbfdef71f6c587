"""The documentation site: it builds without a warning, and reads as the pages do on GitHub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shipped.test_docs import DOCS, REPO, prose


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build with --strict: a page outside the navigation, a broken link or a broken anchor fails."""
    pytest.importorskip("material", reason="needs mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml"]
    done = subprocess.run(
        [*command, "-d", str(folder)], cwd=REPO, capture_output=True, text=True, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    pages = [Path(name) for name in DOCS if name.startswith("docs/") and name != "docs/index.md"]
    others = [Path("docs") / name for name in ("changelog.md", "contributing.md", "security.md")]
    for page in [*pages, *others]:
        assert (site / page.relative_to("docs").with_suffix("") / "index.html").is_file(), page
    assert not (site / "site").exists()


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text()
        )
        assert loaded == [], page


def test_a_file_name_after_the_language_is_the_title_of_the_block(site: Path) -> None:
    text = (site / "user-task" / "index.html").read_text()
    assert '<span class="filename">qa/train.jsonl</span>' in text


def test_no_markup_is_left(site: Path) -> None:
    """Such as a fence or a table that Python-Markdown does not recognize as one."""
    for page in site.rglob("index.html"):
        text = re.sub(r"<code>.*?</code>", "", page.read_text(), flags=re.DOTALL)
        assert "```" not in text, page
        assert not re.search(r"<p>\||\|-{3}", text), page


def test_each_page_is_in_the_navigation_once() -> None:
    nav = (
        (REPO / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    )
    pages = re.findall(r"[\w/-]+\.md$", nav, re.MULTILINE)
    assert sorted(pages) == sorted(set(pages))


@pytest.mark.parametrize("name", [name for name in DOCS if name.startswith("docs/")])
def test_lists_and_tables_begin_after_an_empty_line(name: str) -> None:
    """As Python-Markdown requires, and GitHub does not."""
    blocks = re.split(r"\n\s*\n", re.sub(r"<!--.*?-->", "", prose(DOCS[name]), flags=re.DOTALL))
    for block in blocks:
        first, *others = block.strip("\n").splitlines() or [""]
        for mark in (r"[-*] |\d+\. ", r"\|"):
            if not re.match(rf"\s*(?:{mark})", first):
                assert not [line for line in others if re.match(mark, line)], block
