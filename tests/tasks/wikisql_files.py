"""A small WikiSQL table, questions about it, and writers for its files."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

TABLE = {
    "id": "1-10-2",
    "header": ["Player", "No.", "Score", "Score", ""],
    "types": ["text", "real", "real", "real", "text"],
    "rows": [["Ann Lee", 4, 7, 1.5, "x"], ["Bo Day", 8, 9, 2.5, "y"], ["Cy Ito", 8, 3, 3.5, "Y"]],
}
ROWS: list[dict[str, Any]] = [
    {"table_id": "1-10-2", "question": "Who wears 4?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, 4]]}},
    {"table_id": "1-10-2", "question": "How many wear 8?", "sql": {"sel": 0, "agg": 3, "conds": [[1, 0, "8"]]}},
    {"table_id": "1-10-2", "question": "Top score over 2?", "sql": {"sel": 2, "agg": 1, "conds": [[3, 1, 2]]}},
]  # fmt: skip


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_database(file: Path, table: dict[str, Any]) -> Path:
    """Write the official layout: lower-case cells, columns col0, col1, ..."""
    name = f"table_{table['id'].replace('-', '_')}"
    connection = sqlite3.connect(file)
    with connection:
        columns = ", ".join(f"col{i} {kind}" for i, kind in enumerate(table["types"]))
        connection.execute(f"CREATE TABLE {name} ({columns})")
        for row in table["rows"]:
            cells = [cell.lower() if isinstance(cell, str) else cell for cell in row]
            marks = ", ".join("?" * len(cells))
            connection.execute(f"INSERT INTO {name} VALUES ({marks})", cells)
    connection.close()
    return file
