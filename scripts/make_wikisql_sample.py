#!/usr/bin/env python
"""Generate a sample in WikiSQL's format: invented tables, questions, SQL and databases.

    python scripts/make_wikisql_sample.py OUT [--seed 7] [--train 2000] [--dev 200]

For train and dev, OUT contains SPLIT.jsonl (questions with their SQL), SPLIT.tables.jsonl and
SPLIT.db (SQLite in the official layout: table_<id>, col0.., lower-case text). No table or header of
dev occurs in train. Every query has a non-empty result, and every condition's value occurs in its
question. The same arguments produce the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
QUESTIONS_PER_TABLE = 5
Cell = str | int | float

# A column is "Header|Other header: kind"; a kind is the name of a pool below, "year", a range of
# numbers "1-40" (with a point: one decimal), or the words themselves after "=". The first column
# names the row's subject and is in every table of the domain.
DOMAINS: tuple[tuple[str, ...], ...] = (
    ("Player|Athlete: person", "Team|Club: team", "Points|Score: 2-60", "Games|Matches: 3-82",
     "Position|Role: =guard,forward,center,winger,goalkeeper,striker", "Height: 1.6-2.2",
     "Nationality|Country: country", "Season|Year: year"),
    ("Film|Title: title", "Director: person", "Year|Released: year", "Budget: 2-240",
     "Genre: =drama,comedy,thriller,western,horror,romance", "Rating: 2.0-9.8", "Studio: company",
     "Runtime|Length: 70-210"),
    ("City|Town: place", "Country: country", "Population: 4000-900000", "Mayor: person",
     "Area: 12.0-800.0", "Founded: year", "Elevation|Altitude: 2-2400"),
    ("Employee|Name: person", "Department|Division: =sales,finance,legal,support,design,research",
     "Salary|Pay: 24000-180000", "Age: 19-66", "Office|Location: place", "Hired|Start year: year",
     "Manager|Supervisor: person"),
    ("Album|Record: title", "Artist|Band: person", "Label: company", "Tracks|Songs: 6-24",
     "Sales|Copies sold: 1000-950000", "Genre|Style: =rock,jazz,folk,soul,blues,pop",
     "Year: year"),
    ("River|Stream: river", "Country: country", "Length: 20-4800", "Mouth: place",
     "Basin area|Drainage: 900-98000", "Discharge|Flow: 1.0-900.0", "Source: mountain"),
    ("Candidate|Nominee: person", "Party: =liberal,labour,green,national,reform,centre",
     "Votes: 200-98000", "District|Constituency: place", "Percentage|Share: 1.0-79.0",
     "Year|Election: year", "Result: =elected,defeated,withdrew,runoff"),
    ("Mountain|Peak: mountain", "Range: river", "Height|Elevation: 900-8700", "Country: country",
     "First ascent|Climbed: year", "Prominence: 50-3900"),
    ("School|College: place", "Mascot|Nickname: team", "Enrollment|Students: 90-48000",
     "Conference|League: =north,south,east,west,central,coastal", "Established|Founded: year",
     "Type: =public,private,charter,technical"),
    ("Car|Model: title", "Maker|Manufacturer: company", "Engine: =petrol,diesel,electric,hybrid",
     "Price|Cost: 9000-140000", "Top speed|Speed: 120-340", "Year|Launched: year",
     "Weight: 0.8-3.4", "Doors: 2-5"),
    ("Ship|Vessel: title", "Builder|Shipyard: company", "Launched|Completed: year",
     "Crew: 8-1900", "Captain|Commander: person", "Speed: 8.0-38.0", "Port|Home port: place",
     "Class|Type: =frigate,tanker,ferry,cruiser,trawler"),
    ("Book|Novel: title", "Author|Writer: person", "Pages: 80-1200", "Publisher: company",
     "Language: =english,french,german,spanish,russian,italian", "Published|Year: year",
     "Price: 4.0-60.0"),
    ("Station|Stop: place", "Line|Route: =red,blue,green,orange,purple,silver",
     "Opened|Year opened: year", "Platforms|Tracks: 1-16", "Passengers|Riders: 300-99000",
     "Zone: 1-9", "Operator: company"),
    ("Driver|Rider: person", "Team|Constructor: company", "Laps: 10-78", "Grid|Start: 1-26",
     "Time: 60.0-140.0", "Wins: 0-40", "Circuit|Track: place", "Country: country"),
)  # fmt: skip

_FIRST = "Anna Boris Carla David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria Nils Olga Paul Rosa Simon Tara Victor"  # noqa: E501
_LAST = "Adams Becker Costa Dalton Eriksen Foster Grant Hansen Ivanov Jensen Keller Lopez Moore Novak Olsen Parker Quinn Rossi Smith Turner Varga Weber Young"  # noqa: E501
_PLACE = "Ash Black Clear Deer East Fair Green Hart King Lake Maple North Oak Red Silver Stone West White Wind Wood"  # noqa: E501
_ENDS = "bridge bury dale field ford ham haven mouth port ton view wick"
_ADJECTIVES = "Broken Crimson Distant Empty Final Golden Hidden Iron Last Little Lonely Quiet Secret Silent Wild Winter"  # noqa: E501
_NOUNS = "Arrow Bell Crown Dream Echo Falcon Garden Harbor Island Journey Lantern Mirror Ocean River Shadow Star Summer Tiger Tower Voyage"  # noqa: E501
_TEAMS = "Bears Bulls Comets Eagles Falcons Giants Hawks Knights Lions Pirates Rams Rockets Sharks Tigers Wolves"  # noqa: E501
_COUNTRIES = "Argentina Austria Brazil Canada Chile Denmark Egypt Finland France Germany Greece India Ireland Italy Japan Kenya Mexico Norway Peru Poland Portugal Spain Sweden Turkey"  # noqa: E501


def _pairs(left: str, right: str, joint: str = " ") -> list[str]:
    return [f"{one}{joint}{other}" for one in left.split() for other in right.split()]


POOLS: dict[str, list[str]] = {
    "person": _pairs(_FIRST, _LAST),
    "place": _pairs(_PLACE, _ENDS, ""),
    "title": _pairs(_ADJECTIVES, _NOUNS),
    "team": _pairs("Bay Capital City Coast Metro Royal Union Valley", _TEAMS),
    "company": _pairs(_LAST, "Bros Group Motors Media Works"),
    "river": _pairs(_PLACE, "River Creek Run"),
    "mountain": [f"Mount {name}" for name in _LAST.split()] + _pairs(_PLACE, "Peak Ridge"),
    "country": _COUNTRIES.split(),
}

# {s}: the selected column.
HEADS: dict[str, tuple[str, ...]] = {
    "": ("What is the {s}", "Which {s} is listed", "Tell me the {s}", "Name the {s}",
         "What {s} is shown", "Give me the {s}"),
    "MAX": ("What is the highest {s}", "What is the maximum {s}", "Tell me the largest {s}",
            "Name the highest {s}", "Find the maximum {s}"),
    "MIN": ("What is the lowest {s}", "What is the minimum {s}", "Tell me the smallest {s}",
            "Name the lowest {s}", "Find the minimum {s}"),
    "COUNT": ("How many {s} entries are there", "How many {s} values are listed",
              "What is the number of {s} entries", "Count the {s} entries",
              "Tell me the number of {s} values"),
    "SUM": ("What is the total {s}", "What is the sum of the {s}", "Add up the {s}",
            "Tell me the total {s}", "What is the combined {s}"),
    "AVG": ("What is the average {s}", "What is the mean {s}", "Tell me the average {s}",
            "Name the mean {s}", "Find the average {s}"),
}  # fmt: skip
WHO = ("Who is the {s}", "Who is listed as the {s}")
CLAUSES = ("when", "where", "if")  # ... the points is over 30
PHRASES = ("with", "for", "having")  # ... points over 30
COMPARISONS = {
    ">": ("greater than", "more than", "above", "over", "higher than"),
    "<": ("less than", "smaller than", "below", "under", "lower than"),
}
YEARS = {">": ("after", "later than", "greater than"), "<": ("before", "earlier than", "less than")}


@dataclass(frozen=True)
class Column:
    """A generated column: its header, its kind in ``DOMAINS`` and its cells."""

    header: str
    kind: str
    cells: tuple[Cell, ...]

    @property
    def real(self) -> bool:
        return self.kind == "year" or self.kind[0].isdigit()


@dataclass(frozen=True)
class Table:
    id: str
    columns: tuple[Column, ...]

    @property
    def header(self) -> list[str]:
        return [column.header for column in self.columns]

    @property
    def types(self) -> list[str]:
        return ["real" if column.real else "text" for column in self.columns]

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def draw_cells(kind: str, count: int, rng: random.Random, distinct: bool) -> tuple[Cell, ...]:
    if kind == "year":
        return tuple(rng.randint(1900, 2022) for _ in range(count))
    if kind[0].isdigit():
        low, high = kind.split("-")
        if "." in kind:
            return tuple(round(rng.uniform(float(low), float(high)), 1) for _ in range(count))
        return tuple(rng.randint(int(low), int(high)) for _ in range(count))
    pool = kind[1:].split(",") if kind[0] == "=" else POOLS[kind]
    return tuple(rng.sample(pool, count) if distinct else rng.choices(pool, k=count))


def draw_table(identifier: str, rng: random.Random) -> Table:
    """Return a table of 3 to 6 columns and 6 to 12 rows from one domain."""
    subject, *others = rng.choice(DOMAINS)
    specs = [subject, *rng.sample(others, rng.randint(2, min(5, len(others))))]
    count = rng.randint(6, 12)
    columns = []
    for spec in specs:
        headers, kind = spec.split(": ")
        header = rng.choice(headers.split("|"))
        columns.append(Column(header, kind, draw_cells(kind, count, rng, spec is subject)))
    rng.shuffle(columns)
    return Table(identifier, tuple(columns))


def draw_query(table: Table, rng: random.Random) -> dict[str, object]:
    """Return a query whose conditions match at least one row."""
    indices = list(range(len(table.columns)))
    sel = rng.choice(indices)
    aggregations = AGGREGATIONS[1:] if table.columns[sel].real else ("COUNT",)
    agg = "" if rng.random() < 0.6 else rng.choice(aggregations)
    row = rng.choice(table.rows)
    others = [index for index in indices if index != sel]
    count = min(rng.choices((1, 2, 3), weights=(60, 30, 10))[0], len(others))
    conds = []
    for index in rng.sample(others, count):
        operator, value = "=", row[index]
        if table.columns[index].real and rng.random() < 0.7:
            operator = rng.choice((">", "<")) if value else "<"
            value = beyond(value, operator, table.columns[index].kind, rng)
        conds.append([index, OPERATORS.index(operator), value])
    return {"sel": sel, "agg": AGGREGATIONS.index(agg), "conds": conds}


def beyond(value: Cell, operator: str, kind: str, rng: random.Random) -> Cell:
    """Return a non-negative bound that ``value`` satisfies."""
    assert not isinstance(value, str)
    reach = 15 if kind == "year" else value * 0.2
    step = 0.1 if isinstance(value, float) else 1
    step = max(step, round(reach * rng.random(), 1 if isinstance(value, float) else None))
    return round(max(value - step, 0) if operator == ">" else value + step, 1)


def draw_question(table: Table, query: dict, rng: random.Random) -> str:
    selected = table.columns[query["sel"]]
    agg = AGGREGATIONS[query["agg"]]
    who = not agg and selected.kind == "person" and rng.random() < 0.5
    head = rng.choice(WHO if who else HEADS[agg]).format(s=spoken(selected.header, rng))
    as_clause = rng.random() < 0.5
    joint = rng.choice(CLAUSES if as_clause else PHRASES)
    said = [say_condition(table.columns[i], op, v, as_clause, rng) for i, op, v in query["conds"]]
    conditions = f"{joint} {' and '.join(said)}"
    mark = "?" if head.startswith(("What", "Which", "How", "Who")) else "."
    if rng.random() < 0.25:
        return f"{conditions[0].upper()}{conditions[1:]}, {head[0].lower()}{head[1:]}{mark}"
    return f"{head} {conditions}{mark}"


def say_condition(
    column: Column, operator: int, value: Cell, as_clause: bool, rng: random.Random
) -> str:
    name, symbol = spoken(column.header, rng), OPERATORS[operator]
    if symbol != "=":
        words = rng.choice((YEARS if column.kind == "year" else COMPARISONS)[symbol])
        return f"the {name} is {words} {value}" if as_clause else f"{name} {words} {value}"
    if as_clause:
        return rng.choice((f"the {name} is {value}", f"{name} is {value}"))
    article = "an" if name[0].lower() in "aeiou" else "a"
    return rng.choice((f"{article} {name} of {value}", f"{name} {value}", f"the {name} {value}"))


def spoken(header: str, rng: random.Random) -> str:
    return header if rng.random() < 0.2 else header.lower()


def draw_split(
    count: int, first_id: int, taken: set[tuple[str, ...]], rng: random.Random
) -> Iterator[tuple[Table, list[dict]]]:
    """Return tables with ``count`` questions in total and no header in ``taken``."""
    number = first_id
    while count > 0:
        table = draw_table(f"3-{number}-1", rng)
        if tuple(table.header) in taken:
            continue
        number += 1
        records: dict[str, dict] = {}
        while len(records) < min(QUESTIONS_PER_TABLE, count):
            query = draw_query(table, rng)
            question = draw_question(table, query, rng)
            record = {"phase": 1, "table_id": table.id, "question": question, "sql": query}
            records.setdefault(question, record)
        count -= len(records)
        yield table, list(records.values())


def write_split(folder: Path, split: str, drawn: list[tuple[Table, list[dict]]]) -> None:
    tables = [table for table, _ in drawn]
    write_lines(folder / f"{split}.jsonl", [record for _, records in drawn for record in records])
    write_lines(
        folder / f"{split}.tables.jsonl",
        [{"id": t.id, "header": t.header, "types": t.types, "rows": t.rows} for t in tables],
    )
    write_database(folder / f"{split}.db", tables)


def write_lines(file: Path, records: list[dict]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    beside.replace(file)


def write_database(file: Path, tables: list[Table]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    connection = sqlite3.connect(beside)
    with connection:
        for table in tables:
            name = f"table_{table.id.replace('-', '_')}"
            columns = ", ".join(f"col{i} {kind}" for i, kind in enumerate(table.types))
            connection.execute(f"CREATE TABLE {name} ({columns})")
            connection.executemany(
                f"INSERT INTO {name} VALUES ({', '.join('?' * len(table.columns))})",
                [[c.lower() if isinstance(c, str) else c for c in row] for row in table.rows],
            )
    connection.close()
    beside.replace(file)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed: 1 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="output directory")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=positive, default=2000, help="questions in train")
    parser.add_argument("--dev", type=positive, default=200, help="questions in dev")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"OUT = {arguments.out}: is no directory")
    rng = random.Random(arguments.seed)
    train = list(draw_split(arguments.train, 10000, set(), rng))
    seen = {tuple(table.header) for table, _ in train}
    dev = list(draw_split(arguments.dev, 500000, seen, rng))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_split(arguments.out, "train", train)
    write_split(arguments.out, "dev", dev)
    for split, drawn in (("train", train), ("dev", dev)):
        count = sum(len(records) for _, records in drawn)
        print(f"{arguments.out / split}.jsonl: {count} questions, {len(drawn)} tables")


if __name__ == "__main__":
    main()
