"""Load the rows of one split from files and from datasets on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.data.directories import SplitFiles
from lorakit.data.files import read_rows
from lorakit.data.hub import HubName, HubSplit, task_data_set
from lorakit.data.paths import Source, find_sources
from lorakit.data.rows import (
    JoinedRows,
    MemoryBudget,
    RowSequence,
    allow_open_files,
    column_names,
)
from lorakit.data.shares import apportion
from lorakit.data.tables import FileRows, file_digest, first_line
from lorakit.errors import DataError, listed
from lorakit.recipe.data_path import PathOption

#: Reads a file in a task-specific format; returns None for a file in one of the common formats.
FileReader = Callable[[Path], RowSequence | None]


@dataclass(frozen=True)
class SourceRows:
    """The ``rows`` consecutive rows of a split that come from one source of a mixture."""

    label: str
    rows: int
    weight: float


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    ``rows`` is a ``datasets.Dataset`` or a sequence of mappings. ``files`` are the files it was
    read from, in order, with their row counts (empty for the Hub). ``fingerprint`` is a hash of the
    contents. ``incomplete`` maps each file that lacks a column to the columns that it has; in its
    rows the others are None. ``notes`` tell the user which files were chosen and what they lack.
    ``is_head`` is true for the first rows of a stream, which may have more. ``sources`` are those
    of a mixture, in order; empty if the rows are not weighted. ``numbers`` are the rows' numbers in
    their files, from 1, if the split does not have all rows of the files.
    """

    name: str
    rows: RowSequence
    source: str
    fingerprint: str
    files: tuple[tuple[Path, int], ...] = field(default=())
    incomplete: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())
    is_head: bool = False
    sources: tuple[SourceRows, ...] = ()
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def identity(self) -> str:
        """A hash of the contents and of the sources of a mixture: their weights and rows."""
        if not self.sources:
            return self.fingerprint
        sources = [(source.weight, source.rows) for source in self.sources]
        return hashlib.sha256(f"{self.fingerprint}:{sources}".encode()).hexdigest()

    @property
    def source_read(self) -> str:
        """``source``; for a stream, with the number of rows that were read to find its columns."""
        return f"{self.source}, the first {len(self):,} rows" if self.is_head else self.source

    def locate(self, index: int) -> str:
        """``FILE, row N`` (from 1) for the row at ``index``."""
        number = None if self.numbers is None else self.numbers[index]
        for file, count in self.files:
            if index < count:
                return f"{file}, row {number or index + 1}"
            index -= count
        return f"{self.source}, row {number or index + 1}"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column_names(self.rows))

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        if hasattr(self.rows, "features"):
            return list(self.rows[name])  # type: ignore[call-overload]
        return [row.get(name) for row in self.rows]

    def require(self, columns: Sequence[str], causes: Mapping[str, str] | None = None) -> None:
        """Raise DataError if any file lacks one of ``columns``.

        ``causes`` maps a column to what asks for it, such as ``task.text_column = "body"``; the
        message starts with it.
        """
        _require(columns, causes or {}, self.source_read, self.columns)
        for file, found in self.incomplete.items():
            _require(columns, causes or {}, f"{file}, row 1", found)


def _require(
    columns: Sequence[str], causes: Mapping[str, str], where: str, found: Sequence[str]
) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        cause = next((f"{causes[name]}: " for name in missing if name in causes), "")
        raise DataError(
            f"{cause}{where}: no column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; the columns are {', '.join(map(repr, found))}"
        )


def load_split(
    path: PathOption,
    split: str,
    hub: HubName | None = None,
    read_file: FileReader = lambda file: None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Split | None:
    """Load a split, or return None if the source has no such split. With ``skip_bad``, each row of
    a text file that cannot be read becomes an UnreadRow.

    Raises DataError if ``path`` does not exist, a file cannot be read, the split is empty, or
    neither ``path`` nor ``hub`` is given.
    """
    if path is None:
        found = _load_hub(task_data_set(hub), split, limit)
    else:
        sources = find_sources(path, split)
        found = _load_sources(sources, split, read_file, limit, skip_bad) if sources else None
    if found is None:
        return None
    if not len(found):
        raise DataError(f"{found.source}: the split {split!r} is empty")
    return found


def _load_hub(hub: HubSplit, split: str, limit: int | None) -> Split | None:
    found = _hub_rows(hub, split, limit)
    return None if found is None else Split(split, found.rows, hub.label(split), found.digest)


def _hub_rows(hub: HubSplit, split: str, limit: int | None) -> FileRows | None:
    rows = hub.load(split)
    if rows is None:
        return None
    fingerprint = str(getattr(rows, "_fingerprint", hub))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
        fingerprint = f"{fingerprint}:{len(rows)}"
    return FileRows(rows, fingerprint)


def _load_sources(
    sources: Sequence[Source],
    split: str,
    read_file: FileReader,
    limit: int | None,
    skip_bad: bool,
) -> Split | None:
    allow_open_files(sum(len(source.found.files) for source in sources))
    budget = MemoryBudget()
    parts: list[tuple[Path, FileRows]] = []
    counts: list[int] = []
    for source, own_limit in zip(sources, limits(sources, limit), strict=True):
        left = own_limit if limit is None or own_limit is not None else limit - sum(counts)
        found = _load_source(source, split, read_file, left, budget, skip_bad)
        parts += found
        counts.append(sum(len(part.rows) for _, part in found))
    if not parts:
        return None
    digest = hashlib.sha256("\n".join(part.digest for _, part in parts).encode())
    joined = joined_split(split, parts, combined(sources), digest.hexdigest())
    return replace(joined, sources=mixed_sources(sources, counts))


def _load_source(
    source: Source,
    split: str,
    read_file: FileReader,
    limit: int | None,
    budget: MemoryBudget,
    skip_bad: bool,
) -> list[tuple[Path, FileRows]]:
    if source.hub is not None:
        rows = _hub_rows(source.hub, split, limit)
        return [] if rows is None else [(source.found.files[0], rows)]
    parts: list[tuple[Path, FileRows]] = []
    left = limit
    for file in source.found.files:
        if left == 0:
            break
        parts.append((file, _load_file(file, read_file, left, budget, skip_bad)))
        if left is not None:
            left -= len(parts[-1][1].rows)
    return parts


def limits(sources: Sequence[Source | SourceRows], limit: int | None) -> list[int | None]:
    """How many of the first ``limit`` rows each source of a mixture contributes; None if it may
    contribute any number of them."""
    weights = [source.weight for source in sources if source.weight is not None]
    if limit is None or not weights:
        return [None] * len(sources)
    return [max(1, count) for count in apportion(limit, weights)]


def combined(sources: Sequence[Source]) -> SplitFiles:
    """The files of all sources, with the labels of datasets on the Hub."""
    files = [file for source in sources for file in source.found.files]
    return SplitFiles(files, tuple(note for source in sources for note in source.found.notes))


def mixed_sources(sources: Sequence[Source], counts: Sequence[int]) -> tuple[SourceRows, ...]:
    """The sources of a mixture with their numbers of rows; none for other sources. Raises DataError
    for a source without rows."""
    weighted = [SourceRows(s.label, 0, s.weight) for s in sources if s.weight is not None]
    return with_counts(weighted, counts) if weighted else ()


def with_counts(sources: Sequence[SourceRows], counts: Sequence[int]) -> tuple[SourceRows, ...]:
    """The sources with other numbers of rows. Raises DataError for a source without rows."""
    for source, rows in zip(sources, counts, strict=True):
        if not rows:
            raise DataError(f"task.path: {source.label}: the source has no rows")
    pairs = zip(sources, counts, strict=True)
    return tuple(replace(source, rows=rows) for source, rows in pairs)


def _load_file(
    file: Path, read_file: FileReader, limit: int | None, budget: MemoryBudget, skip_bad: bool
) -> FileRows:
    custom = read_file(file)
    if custom is None:
        return read_rows(file, limit, budget, skip_bad)
    rows = custom if limit is None else custom[:limit]
    return FileRows(rows, f"{file_digest(file)}:{len(rows)}")


def joined_split(
    split: str,
    parts: Sequence[tuple[Path, FileRows]],
    chosen: SplitFiles,
    fingerprint: str,
    is_head: bool = False,
) -> Split:
    """Concatenate the rows of all files, with the union of their columns; the split is empty if no
    file has rows. ``is_head`` says that these are only the first rows of each file. Raises
    DataError for columns whose types are incompatible."""
    filled = {file: part.rows for file, part in parts if len(part.rows)}
    names = {file: tuple(column_names(rows)) for file, rows in filled.items()}
    columns = list(dict.fromkeys(name for found in names.values() for name in found))
    incomplete = {file: found for file, found in names.items() if set(found) != set(columns)}
    return Split(
        name=split,
        rows=_concatenate(filled, columns),
        source=listed(chosen.files),
        fingerprint=fingerprint,
        files=tuple((file, len(part.rows)) for file, part in parts),
        incomplete=incomplete,
        notes=(*chosen.notes, *_notes(parts, columns, incomplete, is_head)),
    )


def _notes(
    parts: Sequence[tuple[Path, FileRows]],
    columns: list[str],
    incomplete: dict[Path, tuple[str, ...]],
    is_head: bool,
) -> Iterator[str]:
    empty = [file for file, part in parts if not len(part.rows)]
    if empty and columns:
        yield f"files without rows: {listed(empty)}"
    if incomplete:
        absent = {
            name: [file for file, found in incomplete.items() if name not in found]
            for name in columns
        }
        named = listed(f"{name!r} ({listed(files, 2)})" for name, files in absent.items() if files)
        if is_head:
            yield f"columns missing from the first rows of some files: {named}"
        else:
            yield f"columns missing from some files, empty in their rows: {named}"


def _concatenate(parts: Mapping[Path, RowSequence], columns: list[str]) -> RowSequence:
    rows = list(parts.values())
    if len(rows) < 2:
        return rows[0] if rows else []
    if not all(hasattr(part, "features") for part in rows):
        return JoinedRows(rows, columns)
    return _concatenate_tables(parts) or JoinedRows(rows, columns)


def _concatenate_tables(parts: Mapping[Path, Any]) -> RowSequence | None:
    """Concatenate tables into a single ``datasets.Dataset`` with the union of their columns.

    Returns None if their types differ in ways that do not affect rows (the width of a number, the
    order of a struct's fields). Raises DataError for a column whose kind of type, or whose class
    names, differ between files.
    """
    import datasets
    import pyarrow

    schema = pyarrow.schema([])
    class_names: dict[str, tuple[Path, Any]] = {}
    for file, table in parts.items():
        for column, feature in table.features.items():
            names = getattr(feature, "names", None)
            first, others = class_names.setdefault(column, (file, names))
            if names != others:
                raise DataError(
                    f"column {column!r} has the class names {others} in {first} and {names} in "
                    f"{file}",
                    about="task.path",
                    allowed="the same in all files",
                )
        try:
            schemas = [schema, table.features.arrow_schema]
            schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
        except pyarrow.ArrowException as error:
            reason = f"{file}: {first_line(error)}"
            raise DataError(
                f"a column's type differs between files: {reason}", about="task.path"
            ) from error
    try:
        found: RowSequence = datasets.concatenate_datasets(list(parts.values()))
    except ValueError:
        return None
    return found
