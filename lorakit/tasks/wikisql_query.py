"""WikiSQL's queries: their logical form, their SQL text, and the SQL that SQLite executes.

A query selects one column of one table, under conditions joined by AND. ``render`` writes
``SELECT COUNT("No.") FROM t WHERE "Player" = 'x'``, which ``parse`` reads back as an equal query.
``parse`` also accepts small deviations by a language model (case, spacing, a missing FROM, unquoted
plain names) if they are unambiguous.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
#: How many columns after the last of the header a query may use: some released headers omit
#: repeated names.
SPARE_COLUMNS = 4

_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_TOKEN = re.compile(
    r"""\s*(?: (?P<name>"(?:[^"]|"")*")
             | (?P<string>'(?:[^']|'')*')
             | (?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w))
             | (?P<word>[^\W\d]\w*)
             | (?P<symbol>[=<>()]) )""",
    re.VERBOSE,
)
_END = re.compile(r"[ \t]*(?:[\n;]|$)")

Value = str | int | float
Condition = tuple[int, int, Value]


class QueryError(ValueError):
    """A text or a JSON value is not a query."""


@dataclass(frozen=True)
class Query:
    """``SELECT agg(column sel) WHERE conds``; each condition is (column, operator, value).

    Columns, aggregations and operators are indices into the header, ``AGGREGATIONS`` and
    ``OPERATORS`` (WikiSQL, lib/query.py).
    """

    sel: int
    agg: int
    conds: tuple[Condition, ...] = ()

    @classmethod
    def from_json(cls, data: Any) -> Query:
        """Read ``{"sel", "agg", "conds"}``. Raises QueryError for anything else."""
        if not isinstance(data, dict):
            raise QueryError(f"not a query: {data!r}; allowed: an object")
        for key in ("sel", "agg", "conds"):
            if key not in data:
                raise QueryError(f"missing key {key!r}")
        conds = data["conds"]
        if not isinstance(conds, list):
            raise QueryError(f"conds = {conds!r}; allowed: a list")
        return cls(
            _index(data["sel"], "sel"), _index(data["agg"], "agg"), tuple(map(_condition, conds))
        )

    @classmethod
    def predicted(cls, data: Any) -> Query:
        """Read a prediction as leniently as the official evaluator: it accepts any value, and any
        index that can be compared (1.0 and true equal 1) and executed (column "1").

        Raises QueryError for missing keys, a condition without three parts, and text other than a
        column's number that would be inserted into the SQL.
        """
        try:
            sel, agg, conds = data["sel"], data["agg"], list(data["conds"])
            triples = tuple((column, operator, value) for column, operator, value in conds)
        except (KeyError, TypeError, ValueError) as error:
            raise QueryError(f"not a query: {data!r}") from error
        for column in (sel, *(column for column, _, _ in triples)):
            if isinstance(column, str) and not _DIGITS.fullmatch(column):
                raise QueryError(f"column {column!r}; allowed: an index")
        return cls(sel, agg, triples)

    def to_json(self) -> dict[str, Any]:
        """The official form, ``{"sel", "agg", "conds": [[column, operator, value], ...]}``."""
        return {"sel": self.sel, "agg": self.agg, "conds": [list(cond) for cond in self.conds]}

    def matches(self, other: Query) -> bool:
        """Equality of logical forms. Conditions compare as a set of (column, operator,
        str(value).lower()), regardless of order and repetition; unhashable ones equal nothing."""
        try:
            return self._logical_form() == other._logical_form()
        except TypeError:
            return False

    def _logical_form(self) -> tuple[int, int, set[tuple[int, int, str]]]:
        conditions = {
            (column, operator, str(value).lower()) for column, operator, value in self.conds
        }
        return self.sel, self.agg, conditions

    def statement(self, table: str, types: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """The query as the official evaluator executes it in SQLite (lib/dbengine.py), and its
        parameters; ``types`` are those of the columns ``colN``.

        As there, two conditions on one column both get the value of the last. Raises LookupError or
        TypeError for an index out of range.
        """
        column = f"col{self.sel}"
        if aggregation := AGGREGATIONS[self.agg]:
            column = f"{aggregation}({column})"
        clauses, values = [], {}
        for index, operator, value in self.conds:
            name = f"col{index}"
            clauses.append(f"{name} {OPERATORS[operator]} :{name}")
            values[name] = bound_value(value, types[name])
        where = f" WHERE {' AND '.join(clauses)}" if clauses else ""
        return f"SELECT {column} AS result FROM {table}{where}", values


def bound_value(value: Any, kind: str) -> Any:
    """The value that SQLite compares with a column of type ``kind``: lower-cased like the cells,
    and a number if the column is ``real``. Raises IndexError for text without a number there."""
    if isinstance(value, str):
        value = value.lower()
    if kind == "real" and not isinstance(value, (int, float)):
        return _real(value)
    return value


def _real(text: str) -> float:
    # babel's parse_decimal in the English locale, and the evaluator's fallback after it.
    try:
        return float(Decimal(text.replace(",", "")))
    except InvalidOperation:
        return float(_NUMBER.findall(text)[0])


def _index(value: Any, name: str) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        raise QueryError(f"{name} = {value!r}; allowed: an index")
    return value


def _condition(data: Any) -> Condition:
    if not isinstance(data, list) or len(data) != 3:
        raise QueryError(f"condition {data!r}; allowed: [column, operator, value]")
    column, operator, value = data
    if type(value) not in (str, int, float):
        raise QueryError(f"value of a condition = {value!r}; allowed: text or a number")
    return (
        _index(column, "column of a condition"),
        _index(operator, "operator of a condition"),
        value,
    )


def column_names(header: Sequence[str]) -> list[str]:
    """A distinct name for each column, and for ``SPARE_COLUMNS`` more: whitespace is collapsed,
    empty names are numbered and repeated ones counted (``Score``, ``Score (2)``)."""
    names: list[str] = []
    taken: set[str] = set()
    for index, raw in enumerate([*header, *[""] * SPARE_COLUMNS]):
        base = " ".join(raw.split()) or f"column {index + 1}"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base} ({count})"
        names.append(name)
        taken.add(name)
    return names


def render(query: Query, header: Sequence[str]) -> str:
    """The query as SQL over a table ``t``. Raises QueryError for an index out of range."""
    names = column_names(header)
    selected = _quoted(_name(names, query.sel))
    if not 0 <= query.agg < len(AGGREGATIONS):
        raise QueryError(f"agg = {query.agg}; allowed: 0 to {len(AGGREGATIONS) - 1}")
    aggregation = AGGREGATIONS[query.agg]
    text = f"SELECT {aggregation}({selected})" if aggregation else f"SELECT {selected}"
    conditions = [_render_condition(cond, names) for cond in query.conds]
    return f"{text} FROM t" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


def _render_condition(condition: Condition, names: list[str]) -> str:
    column, operator, value = condition
    if not 0 <= operator < len(OPERATORS):
        raise QueryError(f"operator = {operator}; allowed: 0 to {len(OPERATORS) - 1}")
    if isinstance(value, str):
        literal = "'" + value.replace("'", "''") + "'"
    elif math.isfinite(value):
        literal = repr(value)
    else:
        raise QueryError(f"value of a condition = {value}; allowed: a finite number")
    return f"{_quoted(_name(names, column))} {OPERATORS[operator]} {literal}"


def _name(names: list[str], index: int) -> str:
    if not 0 <= index < len(names):
        raise QueryError(f"column {index}: the table has {len(names) - SPARE_COLUMNS} columns")
    return names[index]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def parse(text: str, header: Sequence[str]) -> Query:
    """The query that ``text`` begins with; anything after a line end or ``;`` is ignored.

    Raises QueryError, and nothing else, if there is no such query or a column is unknown.
    """
    return _Parser(text, column_names(header)).query()


class _Parser:
    """Recursive descent over ``_TOKEN``; ``position`` is the index of the next character."""

    def __init__(self, text: str, names: list[str]) -> None:
        self.text = text
        self.position = 0
        self.exact = {name: index for index, name in enumerate(names)}
        self.folded: dict[str, int | None] = {}
        for index, name in enumerate(names):
            key = name.casefold()
            self.folded[key] = None if key in self.folded else index  # None: ambiguous

    def query(self) -> Query:
        self.expect("select")
        sel, agg = self.selection()
        if self.accept("from") and self.take("word", "name") is None:
            raise self.error("a table")
        conds: list[Condition] = []
        if self.accept("where"):
            conds.append(self.condition())
            while self.accept("and"):
                conds.append(self.condition())
        if not _END.match(self.text, self.position):
            raise self.error("the end")
        return Query(sel, agg, tuple(conds))

    def selection(self) -> tuple[int, int]:
        start = self.position
        word = self.take("word")
        if word and word.upper() in AGGREGATIONS[1:] and self.accept("("):
            sel = self.column()
            self.expect(")")
            return sel, AGGREGATIONS.index(word.upper())
        self.position = start
        return self.column(), 0

    def condition(self) -> Condition:
        column = self.column()
        symbol = self.take("symbol", "word") or ""
        if symbol.upper() not in OPERATORS:
            raise self.error("one of = > <")
        return column, OPERATORS.index(symbol.upper()), self.value()

    def column(self) -> int:
        name = self.take("name", "word")
        if name is None:
            raise self.error("a column")
        if name.startswith('"'):
            name = name[1:-1].replace('""', '"')
        index = self.exact.get(name)
        if index is None:
            index = self.folded.get(" ".join(name.split()).casefold())
        if index is None:
            raise QueryError(f"no column {name!r}")
        return index

    def value(self) -> Value:
        if (number := self.take("number")) is not None:
            return _number(number)
        quoted = self.take("string", "name")
        if quoted is None:
            raise self.error("a value")
        return quoted[1:-1].replace(quoted[0] * 2, quoted[0])

    def take(self, *kinds: str) -> str | None:
        """The next token if it is of one of ``kinds``."""
        match = _TOKEN.match(self.text, self.position)
        if match is None or match.lastgroup not in kinds:
            return None
        self.position = match.end()
        return match.group(match.lastgroup)

    def accept(self, expected: str) -> bool:
        start = self.position
        token = self.take("symbol", "word")
        if token is not None and token.lower() == expected:
            return True
        self.position = start
        return False

    def expect(self, expected: str) -> None:
        if not self.accept(expected):
            raise self.error(expected.upper())

    def error(self, expected: str) -> QueryError:
        return QueryError(
            f"expected {expected} at {self.text[self.position : self.position + 20]!r}"
        )


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # a fraction, an exponent, or more digits than int() accepts
        return float(text)
