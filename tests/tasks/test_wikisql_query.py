"""SQL text: queries round-trip, and the parser raises nothing but QueryError."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lorakit.tasks.wikisql import read_rows
from lorakit.tasks.wikisql_query import (
    SPARE_COLUMNS,
    Query,
    QueryError,
    column_names,
    parse,
    render,
)

HEADER = ["Player", "No.", 'The "big" one', "Score", "Score", "score", ""]


def test_rendered_form() -> None:
    query = Query(1, 3, ((0, 0, "O'Neil"), (3, 1, 5)))
    expected = """SELECT COUNT("No.") FROM t WHERE "Player" = 'O''Neil' AND "Score" > 5"""
    assert render(query, HEADER) == expected


def test_names_are_distinct() -> None:
    names = column_names(["a", "a", " a ", "a (2)", "", "x\n y"])
    assert names[:6] == ["a", "a (2)", "a (3)", "a (2) (2)", "column 5", "x y"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "'",
        "''",
        '"',
        "a\nb",
        "a;b",
        "AND",
        "x' OR '1'='1",
        "5",
        5,
        -5,
        0,
        0.5,
        -1e-07,
        1e300,
        5.0,
    ],
)
def test_values_round_trip(value: str | int | float) -> None:
    query = Query(0, 0, ((2, 2, value), (4, 1, value)))
    read = parse(render(query, HEADER), HEADER)
    assert read == query
    assert [type(cond[2]) for cond in read.conds] == [type(value)] * 2


@pytest.mark.parametrize("index", range(len(HEADER) + SPARE_COLUMNS))
def test_every_column_round_trips(index: int) -> None:
    query = Query(index, 5, ((index, 0, "x"),))
    assert parse(render(query, HEADER), HEADER) == query


def test_index_out_of_range() -> None:
    for query in (Query(99, 0), Query(-1, 0), Query(0, 6), Query(0, 0, ((0, 4, "x"),))):
        with pytest.raises(QueryError):
            render(query, HEADER)
    with pytest.raises(QueryError, match="nan"):
        render(Query(0, 0, ((0, 0, float("nan")),)), HEADER)


@pytest.mark.parametrize(
    "text",
    [
        """select "player" where "no." = 4""",
        """ SELECT Player FROM t WHERE "No."=4""",
        """SELECT\n"Player"\nFROM t\nWHERE "No." = 4;\nquestion: next""",
        """SELECT "Player" FROM "some table" WHERE "No." = 4\n- and so on""",
    ],
)
def test_small_deviations_are_accepted(text: str) -> None:
    assert parse(text, HEADER) == Query(0, 0, ((1, 0, 4),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT",
        'SELECT "Nobody" FROM t',
        'SELECT "Player", "No." FROM t',
        'SELECT "Player" FROM t WHERE',
        'SELECT "Player" FROM t WHERE "No." = 4 LIMIT 1',
        'SELECT "Player" FROM t WHERE "No." >= 4',
        'SELECT "Player" FROM t WHERE "No." = 4 OR "No." = 5',
        'SELECT "Player" FROM t WHERE "No." = \'unfinished',
        'SELECT "SCORE" FROM t',  # which of three?
        "SELECT * FROM t",
        "SELECT MAX(Player FROM t",
    ],
)
def test_invalid_text_is_an_error(text: str) -> None:
    with pytest.raises(QueryError):
        parse(text, HEADER)


def test_no_text_raises_another_error() -> None:
    rng = random.Random(0)
    pieces = ['SELECT ', '"Player"', "FROM t", " WHERE ", "'", '"', "(", ")", "= ", "5", "5e", " AND ",
              "\n", ";", "MAX", "é", "\x00", "-", "1e999", "9" * 5000, "\ud800", "=", ">", "No."]  # fmt: skip
    read = 0
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        try:
            parse(text, HEADER)
            read += 1
        except QueryError:
            pass
    assert read > 0  # some of them are queries, so the reader got past the first word


def test_long_noise_is_parsed_quickly() -> None:
    for text in (
        '"' * 100_001,
        "SELECT " + "'" * 100_001,
        "SELECT " * 20_000,
        " " * 200_000,
        f'SELECT "Player" FROM t WHERE "No." = {"9" * 100_000}x',
    ):
        with pytest.raises(QueryError):
            parse(text, HEADER)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_released_query_round_trips(data_dir: Path, split: str) -> None:
    rows = read_rows(data_dir / "wikisql" / f"{split}.jsonl.gz")
    assert len(rows) == {"train": 55_733, "dev": 8_421}[split]
    for row in rows:
        query = Query.from_json(row["sql"])
        text = render(query, row["header"])
        assert parse(f" {text}", row["header"]) == query, text
