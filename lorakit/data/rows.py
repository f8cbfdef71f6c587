"""The rows of files, which are not held in memory as objects."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

from lorakit.data.spool import Source

#: A list, a ``datasets.Dataset``, or one of the classes here.
Rows = Sequence[Mapping[str, Any]]


class _LazyRows(Sequence[Mapping[str, Any]]):
    """``column_names``, and rows that are made when they are asked for."""

    column_names: list[str]

    def _row(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._row(index % len(self))


class JsonRows(_LazyRows):
    """One JSON object a line, parsed when it is asked for, with every name in ``column_names``.

    ``starts`` holds where each row's line begins, and at last where the lines end; blank lines may
    stand between. The lines are known to be valid.
    """

    def __init__(self, source: Source, starts: array[int], column_names: list[str]) -> None:
        self._source = source
        self._starts = starts
        self.column_names = column_names

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _row(self, index: int) -> dict[str, Any]:
        data = self._source.read(self._starts[index], self._starts[index + 1])
        row = json.loads(data.partition(b"\n")[0].decode("utf-8-sig"))
        return {name: row.get(name) for name in self.column_names}


class JoinedRows(_LazyRows):
    """The rows of several files one after another, with the columns ``column_names``."""

    def __init__(self, parts: Sequence[Rows], column_names: list[str]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.column_names = column_names

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        row = self._parts[number][index - start]
        return {name: row[name] for name in self.column_names}


def column_names(rows: Rows) -> list[str]:
    names = getattr(rows, "column_names", None)
    return list(rows[0] if names is None else names)


def row_range(rows: Rows, start: int, stop: int) -> Sequence[Mapping[str, Any]]:
    """``rows[start:stop]`` as rows: of a ``Dataset``, whose single rows are slow, read at once."""
    if not hasattr(rows, "features"):
        return rows[start:stop]
    columns: Any = rows[start:stop]
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
