"""A data file -> its rows, without a guess at what its text means.

jsonl and parquet are read by ``datasets`` (Arrow, cached on disk). csv and tsv are read here: every
cell is text as it stands, so that ``NA``, ``null`` and ``007`` stay what they are.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")

_DATE = re.compile(r"(timestamp|time32|time64|date32|date64|duration)\b")

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
    return _read_with_datasets(file)


def _read_with_datasets(file: Path) -> Rows:
    import datasets

    builder = "parquet" if file.suffix == ".parquet" else "json"
    try:
        with _silent(datasets):
            rows = datasets.load_dataset(builder, data_files=str(file), split="train")
    except Exception as error:  # datasets raises what its readers raise
        if builder == "json" and not _json_objects(file):  # which itself raises for a bad row
            return []
        raise DataError(f"{file}: cannot be read: {_first_line(error)}") from error
    if builder == "json":
        for _ in _lines(file):  # Arrow takes any bytes for text, and fails when a row is used
            pass
        if _DATE.search(str(rows.features)):  # JSON has no dates: Arrow took text for them
            return _filled(_json_objects(file))
    return rows  # type: ignore[no-any-return]


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
        rows.append(value)
    return rows


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with every key that any has, as Arrow would have it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


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


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """No progress bars and no log lines: what goes wrong is told once, by the exception."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
