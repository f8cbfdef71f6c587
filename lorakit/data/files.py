"""A data file -> its rows, without a guess at what its text means.

Each file is opened here and held in memory: a path is never a pattern or a URL, and no cache can
be stale. csv and tsv cells are text as they stand, so that ``NA``, ``null`` and ``007`` stay what
they are.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")

Rows = Sequence[Mapping[str, Any]]


def read_rows(file: Path) -> Rows:
    """The rows of a jsonl, jsonl.gz, csv, tsv or parquet file: a ``datasets.Dataset`` or a list.

    Raises DataError, with the row where that is known, if the file cannot be read as what its name
    says it is, and if it is empty.
    """
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")
    if file.suffix in (".csv", ".tsv"):
        return _read_delimited(file)
    return _read_parquet(file) if file.suffix == ".parquet" else _read_json_lines(file)


def _read_parquet(file: Path) -> Rows:
    import datasets
    import pyarrow.parquet

    try:
        with file.open("rb") as handle:
            table = datasets.table.InMemoryTable(pyarrow.parquet.ParquetFile(handle).read())
        # The fingerprint is given because datasets would hash the whole table for one.
        return datasets.Dataset(table, fingerprint=file.name)  # type: ignore[no-any-return]
    except Exception as error:  # Arrow raises what its readers raise
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from error


def _read_json_lines(file: Path) -> Rows:
    """Each row with every key that any has."""
    rows = _json_objects(file)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows and not names:
        raise DataError(f"{file}: every row is an empty object, {{}}: there are no columns")
    return [{name: row.get(name) for name in names} for row in rows]


def _lines(file: Path) -> Iterator[str]:
    """The lines that are not blank. Raises DataError, with the row, for one that is not UTF-8."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    number += 1
                    yield line.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, row {number}: not UTF-8: {error}") from error


def _json_objects(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(file), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, row {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{file}, row {number}: not a JSON object")
        if "\\ud" in line.lower() and _has_lone_surrogate(value):
            raise DataError(f"{file}, row {number}: half a surrogate pair, which is no text")
        rows.append(value)
    return rows


def _has_lone_surrogate(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_delimited(file: Path) -> Rows:
    """Rows of text. tsv is read as GLUE writes it: a quote is a character like any other."""
    rows: list[dict[str, str]] = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".tsv":
                cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                cells = csv.reader(lines, strict=True)
            header = _checked_header(file, next(cells, []))
            for values in cells:
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{file}, row {len(rows) + 1}: {len(values)} cells; "
                        f"the header has {len(header)}"
                    )
                rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}, row {len(rows) + 1}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _checked_header(file: Path, header: list[str]) -> list[str]:
    if not header:
        raise DataError(f"{file}: the first line is empty; it must name the columns")
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{file}: the header names the column {name!r} twice")
    return header


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
