"""Constructed WikiSQL tables, gold queries and predictions with typical errors."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

from tests.tasks.wikisql_files import write_database, write_lines

TABLES: list[dict[str, Any]] = [
    {
        "id": "1-100-1",
        "header": ["Driver", "Grid", "Laps", "Time", "Team", "Points"],
        "types": ["text", "real", "real", "text", "text", "real"],
        "rows": [
            ["Ann Lee", 1, 55, "1:20.3", "Red-Ox", 10], ["Bo Day", 2, 55, "1:21.0", "Blue", 8.5],
            ["Cy Ito", 3, 54, "Retired", "Red-Ox", 0], ["Dé Núñez", 8, 1200, "+1 lap", "Green's", 4],
            ["Eve O'Hara", 12, 3, "", "Blue", 1.25], ["Bo Day", 20, 55, "1:22.9", "Grey", None],
        ],
    },
    {
        "id": "2-200-7",
        "header": ["Town", "Area", "People", "Since", "Code"],
        "types": ["text", "real", "real", "text", "real"],
        "rows": [
            ["North End", 3.5, 1234567, "1901", -5], ["South", 3, 1000, "1,901", 7],
            ["East (old)", 0.25, 0, "19 May 1901", 7], ["West", 1000000.5, 12, "3.0", 3],
            ["North End", 7, 42, "3", 0],
        ],
    },
    {
        "id": "2-300-12",
        "header": ["Code", "No.", "Result"],
        "types": ["text", "text", "text"],
        "rows": [["A-1", "3", "Won"], ["b-2", "3.0", "LOST"], ["C:3", "1,000", "won"], ["d", "", "Draw"]],
    },
]  # fmt: skip


def gold_rows() -> list[dict[str, Any]]:
    """Return forty queries, some with empty and some with numeric results."""
    draw = random.Random(1709)
    rows = []
    for index in range(40):
        table = draw.choice(TABLES)
        columns = range(len(table["header"]))
        cells = draw.choice(table["rows"])
        conds = []
        for column in draw.sample(columns, draw.choice([0, 1, 1, 1, 2, 2])):
            value = cells[column] if cells[column] is not None else 0
            if draw.random() < 0.5:
                value = str(value)
            if index % 8 == 5:
                value = f"{value}?"
            real = table["types"][column] == "real"
            conds.append([column, draw.choice([0, 0, 1, 2]) if real else 0, value])
        sql = {
            "sel": draw.choice(columns),
            "agg": draw.choice([0, 0, 0, 1, 2, 3, 4, 5]),
            "conds": conds,
        }
        real_conds = [cond for cond in conds if table["types"][cond[0]] == "real"]
        if any(cond[2] in ("", "?") for cond in real_conds):
            continue  # no number to compare with: the gold would not execute
        rows.append({"table_id": table["id"], "question": f"question {index}?", "sql": sql})
    return rows


def predictions(rows: list[dict[str, Any]], width: dict[str, int]) -> list[tuple[int, Any]]:
    """Return pairs (row index, line of a predictions file); ``width`` is the number of columns of
    each table."""
    draw = random.Random(42)
    made: list[tuple[int, Any]] = []
    for index, row in enumerate(rows):
        made.append((index, {"query": copy.deepcopy(row["sql"])}))
        for _ in range(16):
            query = copy.deepcopy(row["sql"])
            for _ in range(draw.choice([1, 1, 1, 2])):
                draw.choice(_CHANGES)(query, draw, width[row["table_id"]])
            made.append((index, {"query": query}))
        made.append((index, draw.choice(_LINES)(row["sql"])))
        made.append((index, draw.choice(_LINES)(row["sql"])))
    return made


def write_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``dev.jsonl``, ``dev.tables.jsonl`` and ``dev.db`` with ``TABLES``."""
    folder.mkdir(exist_ok=True)
    write_lines(folder / "dev.jsonl", rows)
    write_lines(folder / "dev.tables.jsonl", TABLES)
    for table in TABLES:
        write_database(folder / "dev.db", table)
    return folder


def _sel(query: dict[str, Any], draw: random.Random, width: int) -> None:
    sel = query["sel"]
    other: list[Any] = [str(sel), float(sel), bool(sel), -1, width, None, [sel]]
    query["sel"] = draw.choice([*range(width), *other])


def _agg(query: dict[str, Any], draw: random.Random, width: int) -> None:
    agg = query["agg"]
    other: list[Any] = [str(agg), float(agg), bool(agg), agg - 6, -1, 6, None]
    query["agg"] = draw.choice([*range(6), *other])


def _permute(query: dict[str, Any], draw: random.Random, width: int) -> None:
    if isinstance(query["conds"], list):
        draw.shuffle(query["conds"])
        query["conds"] += draw.choices(query["conds"], k=1) if query["conds"] else []


def _value(query: dict[str, Any], draw: random.Random, width: int) -> None:
    if not query["conds"]:
        return
    cond = draw.choice(query["conds"])
    value = cond[2]
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        number = 7.0
    number = number if math.isfinite(number) else 7.0
    made: list[Any] = [
        text, text.upper(), text.title(), f" {text}", f"{text} ", f"'{text}'", f"{text}.0", "", "x",
        number, int(number), f"{number:,.2f}", f"{number:,.0f}", f"{number:e}", f"about {number} m",
        f"+{text}", f"-{text}", f"{text}%", f"1_{text}", True, False, None, [value], "nan", "inf",
        "1,2,3", "3", "3.0", 3, 3.0, 10**20, "\u0663", "\uff13",
    ]  # fmt: skip
    cond[2] = draw.choice(made)


def _column(query: dict[str, Any], draw: random.Random, width: int) -> None:
    if query["conds"]:
        cond = draw.choice(query["conds"])
        cond[0] = draw.choice([*range(width), str(cond[0]), _like(cond[0], float), -1, width])


def _operator(query: dict[str, Any], draw: random.Random, width: int) -> None:
    if query["conds"]:
        cond = draw.choice(query["conds"])
        cond[1] = draw.choice([0, 1, 2, 3, 4, -1, -2, -4, "0", _like(cond[1], float), "=", None])


def _like(value: Any, kind: type) -> Any:
    return kind(value) if isinstance(value, int) else value


def _more(query: dict[str, Any], draw: random.Random, width: int) -> None:
    """Add a condition, often on a column that already has one."""
    taken = [cond[0] for cond in query["conds"]] or [0]
    column = draw.choice([*taken, draw.randrange(width)])
    query["conds"].append([column, draw.randrange(3), draw.choice(["3", 7, "won", 0])])


def _fewer(query: dict[str, Any], draw: random.Random, width: int) -> None:
    if query["conds"]:
        query["conds"].pop(draw.randrange(len(query["conds"])))


def _extra(query: dict[str, Any], draw: random.Random, width: int) -> None:
    query["table"] = "another"


_CHANGES = [_sel, _agg, _permute, _value, _value, _value, _column, _operator, _more, _fewer, _extra]
_LINES = [
    lambda sql: {"error": "cannot say"},
    lambda sql: {"error": "cannot say", "query": sql},
    lambda sql: {"error": "", "query": sql},
    lambda sql: {"error": None, "query": sql},
    lambda sql: {"error": ""},
    lambda sql: {"query": None},
    lambda sql: {"query": "SELECT"},
    lambda sql: {"query": [sql["sel"], sql["agg"], sql["conds"]]},
    lambda sql: {"query": {"sel": sql["sel"], "agg": sql["agg"]}},
    lambda sql: {"query": {"agg": sql["agg"], "conds": sql["conds"]}},
    lambda sql: {"query": {**sql, "conds": None}},
    lambda sql: {"query": {**sql, "conds": {}}},
    lambda sql: {"query": {**sql, "conds": ""}},
    lambda sql: {"query": {**sql, "conds": ["000"]}},
]
