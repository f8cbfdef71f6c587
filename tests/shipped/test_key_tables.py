"""docs/migrate.md has the keys of other tools as the package has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorakit.recipe.peers.hints import TOOLS
from tests.shipped.test_docs import DOCS, REPO


def test_the_tables_are_those_of_the_package() -> None:
    """If this fails: python scripts/key_tables.py"""
    file = REPO / "scripts" / "key_tables.py"
    spec = importlib.util.spec_from_file_location("key_tables", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = DOCS[str(Path("docs", "migrate.md"))]
    assert all(f"<!-- keys of {tool} -->" in page for tool in TOOLS)
    assert module.with_tables(page) == page
