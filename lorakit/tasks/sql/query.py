"""WikiSQL's logical form: one column selected from one table, under conditions joined by AND."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")

_DIGITS = re.compile(r"[0-9]+")

Value = str | int | float
Condition = tuple[int, int, Value]


class QueryError(ValueError):
    """The text or the JSON is not a query of this form."""


@dataclass(frozen=True)
class Query:
    """``SELECT agg(column sel) WHERE conds``; each condition is (column, operator, value).

    Columns, aggregations and operators are indices: of the header, of ``AGGREGATIONS`` and of
    ``OPERATORS`` (WikiSQL, lib/query.py).
    """

    sel: int
    agg: int
    conds: tuple[Condition, ...] = ()

    @classmethod
    def from_json(cls, data: Any) -> Query:
        """Read ``{"sel", "agg", "conds"}``. Raises QueryError if it is anything else."""
        if not isinstance(data, dict):
            raise QueryError(f"a query is an object, not {data!r}")
        for key in ("sel", "agg", "conds"):
            if key not in data:
                raise QueryError(f"no key {key!r}")
        conds = data["conds"]
        if not isinstance(conds, list):
            raise QueryError(f"conds = {conds!r}: not a list")
        return cls(
            _index(data["sel"], "sel"), _index(data["agg"], "agg"), tuple(map(_condition, conds))
        )

    @classmethod
    def predicted(cls, data: Any) -> Query:
        """Read a prediction as leniently as the official evaluator: an index may be anything, as
        long as the logical form compares (1.0 and true equal 1) and the query executes
        (column "1" does), and so may a value.

        Raises QueryError for what has not these keys, a condition that is not of three parts, and
        text that would stand in the SQL without being a column's number.
        """
        try:
            sel, agg, conds = data["sel"], data["agg"], list(data["conds"])
            triples = tuple((column, operator, value) for column, operator, value in conds)
        except (KeyError, TypeError, ValueError) as error:
            raise QueryError(f"not a query: {data!r}") from error
        for column in (sel, *(column for column, _, _ in triples)):
            if isinstance(column, str) and not _DIGITS.fullmatch(column):
                raise QueryError(f"a column is an index, not {column!r}")
        return cls(sel, agg, triples)

    def to_json(self) -> dict[str, Any]:
        """The official form, ``{"sel", "agg", "conds": [[column, operator, value], ...]}``."""
        return {"sel": self.sel, "agg": self.agg, "conds": [list(cond) for cond in self.conds]}

    def matches(self, other: Query) -> bool:
        """Equality of logical forms: the conditions compare as a set of
        (column, operator, str(value).lower()), so their order and repeats do not count. What
        cannot stand in a set is equal to nothing."""
        try:
            return (self.sel, self.agg, self._condition_set()) == (
                other.sel,
                other.agg,
                other._condition_set(),
            )
        except TypeError:
            return False

    def _condition_set(self) -> set[tuple[int, int, str]]:
        return {(column, operator, str(value).lower()) for column, operator, value in self.conds}


def _index(value: Any, name: str) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        raise QueryError(f"{name} = {value!r}: not an index")
    return value


def _condition(data: Any) -> Condition:
    if not isinstance(data, list) or len(data) != 3:
        raise QueryError(f"a condition is [column, operator, value], not {data!r}")
    column, operator, value = data
    if type(value) not in (str, int, float):
        raise QueryError(f"a condition's value is text or a number, not {value!r}")
    return (
        _index(column, "a condition's column"),
        _index(operator, "a condition's operator"),
        value,
    )
