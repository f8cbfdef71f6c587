"""Fixtures of the tests of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.wikisql_files import ROWS, TABLE, write_database, write_lines

WikiSqlWriter = Callable[..., Path]


@pytest.fixture
def wikisql_folder(tmp_path: Path) -> WikiSqlWriter:
    """Return a function that writes a WikiSQL directory with one split."""

    def write(
        split: str = "dev",
        rows: list[dict[str, Any]] = ROWS,
        table: dict[str, Any] = TABLE,
        database: bool = True,
    ) -> Path:
        folder = tmp_path / "wikisql"
        folder.mkdir(exist_ok=True)
        write_lines(folder / f"{split}.jsonl", rows)
        write_lines(folder / f"{split}.tables.jsonl", [table])
        if database:
            write_database(folder / f"{split}.db", table)
        return folder

    return write
