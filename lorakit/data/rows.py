"""The rows of files, which are not held in memory as objects."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, overload

from lorakit.data.spool import Source

#: A list, a ``datasets.Dataset``, or one of the classes here.
Rows = Sequence[Mapping[str, Any]]

_DECODER = json.JSONDecoder()


class UnreadRow(dict[str, Any]):
    """Stands for a row that could not be read, with None in every column."""

    def __init__(self, reason: str, columns: Sequence[str] = ()) -> None:
        super().__init__(dict.fromkeys(columns))
        self.reason = reason


class _LazyRows(Sequence[Mapping[str, Any]]):
    """``column_names``, and rows that are made when they are asked for."""

    column_names: list[str]

    def _row(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        return [self._row(index) for index in range(start, stop)]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._rows(start, stop)
            return [self._row(i) for i in range(start, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._row(index % len(self))


class JsonRows(_LazyRows):
    """JSON objects, parsed when they are asked for, with every name in ``column_names``.

    ``starts`` holds where each object begins, or white space before it, and at last where the text
    ends; what stands between an object and the next one is not read. The objects are known to be
    valid, but for the rows in ``unread``, by index with the reason.
    """

    def __init__(
        self,
        source: Source,
        starts: array[int],
        column_names: list[str],
        unread: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._source = source
        self._starts = starts
        self._unread = unread
        self.column_names = column_names

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _row(self, index: int) -> dict[str, Any]:
        if index in self._unread:
            return UnreadRow(self._unread[index], self.column_names)
        data = self._source.read(self._starts[index], self._starts[index + 1])
        row, _ = _DECODER.raw_decode(data.decode("utf-8-sig").lstrip(" \t\r\n"))
        return {name: row.get(name) for name in self.column_names}


class JoinedRows(_LazyRows):
    """The rows of several files one after another, with the columns ``column_names``: None for
    one that a row does not have."""

    def __init__(self, parts: Sequence[Rows], column_names: list[str]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.column_names = column_names

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return self._filled(self._parts[number][index - start])

    def _rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - len(part)
            begin, until = max(start - first, 0), min(stop - first, len(part))
            if begin < until:
                found += map(self._filled, row_range(part, begin, until))
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self._parts:
            yield from map(self._filled, part)

    def _filled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(row, UnreadRow):
            return UnreadRow(row.reason, self.column_names)
        return {name: row.get(name) for name in self.column_names}


def column_names(rows: Rows) -> list[str]:
    """Every name that some row has, in the order in which they first stand."""
    names = getattr(rows, "column_names", None)
    return list(names if names is not None else dict.fromkeys(key for row in rows for key in row))


def row_range(rows: Rows, start: int, stop: int) -> Sequence[Mapping[str, Any]]:
    """``rows[start:stop]`` as rows: of a ``Dataset``, whose single rows are slow, read at once."""
    if not hasattr(rows, "features"):
        return rows[start:stop]
    columns: Any = rows[start:stop]
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
