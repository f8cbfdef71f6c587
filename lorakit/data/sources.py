"""Files or a Hub data set -> the rows of one split, each of which knows its file and row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data.file_names import split_names
from lorakit.data.files import FileRows, read_rows
from lorakit.data.parquet import file_digest, join_tables
from lorakit.data.paths import PathOption, SplitFiles, find_files
from lorakit.data.paths import split_files as split_files
from lorakit.data.rows import JoinedRows, Rows, column_names
from lorakit.data.spool import Room, allow_open_files
from lorakit.errors import DataError, listed

FileReader = Callable[[Path], Rows | None]


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    ``rows`` is a ``datasets.Dataset`` or a sequence of mappings; ``files`` are the files it came
    from, in order, with their row counts (empty for the Hub); ``fingerprint`` is a hash of the
    contents. ``lacking`` has the columns of each file that does not have all: None stands for the
    others in its rows. ``notes`` say what was chosen among the files, or found in them. ``begun``
    says that there may be more rows: these are the first ones of a stream.
    """

    name: str
    rows: Rows
    source: str
    fingerprint: str
    files: tuple[tuple[Path, int], ...] = field(default=())
    lacking: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())
    begun: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source_read(self) -> str:
        """``source``, or of a stream the part of it whose columns are known."""
        return f"{self.source}, the first {len(self):,} rows" if self.begun else self.source

    def locate(self, index: int) -> str:
        """``FILE, row N`` (from 1) for the row at ``index``."""
        for file, count in self.files:
            if index < count:
                return f"{file}, row {index + 1}"
            index -= count
        return f"{self.source}, row {index + 1}"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column_names(self.rows))

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        if hasattr(self.rows, "features"):
            return list(self.rows[name])  # type: ignore[call-overload]
        return [row.get(name) for row in self.rows]

    def require(self, columns: Sequence[str]) -> None:
        """Raise DataError if a column is missing, in all of the files or in one."""
        _require(columns, self.source_read, self.columns)
        for file, found in self.lacking.items():
            _require(columns, f"{file}, row 1", found)


def _require(columns: Sequence[str], where: str, found: Sequence[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise DataError(
            f"{where}: no column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; the columns are {', '.join(map(repr, found))}"
        )


def load_split(
    path: PathOption,
    split: str,
    hub: tuple[str, str | None] | None = None,
    read_file: FileReader = lambda file: None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Split | None:
    """The split's rows, or None if the source has no such split. With ``skip_bad`` an UnreadRow
    stands for each row of text that cannot be read.

    Raises DataError if ``path`` does not exist, a file cannot be read, the split is empty, or
    neither ``path`` nor ``hub`` is given.
    """
    if path is None:
        found = _load_hub(hub, split, limit)
    else:
        there = find_files(path, split)
        found = None
        if there.files:
            found = _load_files(there, split, read_file, limit, skip_bad)
    if found is None:
        return None
    if not len(found):
        raise DataError(f"{found.source}: the split {split!r} is empty")
    return found


def _load_files(
    there: SplitFiles, split: str, read_file: FileReader, limit: int | None, skip_bad: bool
) -> Split:
    parts: list[tuple[Path, FileRows]] = []
    left, room = limit, Room()
    allow_open_files(len(there.files))
    for file in there.files:
        if left == 0:
            break
        parts.append((file, _load_file(file, read_file, left, room, skip_bad)))
        if left is not None:
            left -= len(parts[-1][1].rows)
    digest = hashlib.sha256("\n".join(part.digest for _, part in parts).encode())
    return joined_split(split, parts, there, digest.hexdigest())


def _load_file(
    file: Path, read_file: FileReader, limit: int | None, room: Room, skip_bad: bool
) -> FileRows:
    own = read_file(file)
    if own is None:
        return read_rows(file, limit, room, skip_bad)
    rows = own if limit is None else own[:limit]
    return FileRows(rows, f"{file_digest(file)}:{len(rows)}")


def joined_split(
    split: str,
    parts: Sequence[tuple[Path, FileRows]],
    there: SplitFiles,
    fingerprint: str,
    begun: bool = False,
) -> Split:
    """The rows of all files one after another, with the columns that any of them has; empty if no
    file has rows. ``begun`` says that they are only the first ones of each file. Raises DataError
    for columns whose types do not go together."""
    filled = {file: part.rows for file, part in parts if len(part.rows)}
    names = {file: tuple(column_names(rows)) for file, rows in filled.items()}
    every = list(dict.fromkeys(name for found in names.values() for name in found))
    lacking = {file: found for file, found in names.items() if set(found) != set(every)}
    return Split(
        name=split,
        rows=_joined(filled, every),
        source=listed(there.files),
        fingerprint=fingerprint,
        files=tuple((file, len(part.rows)) for file, part in parts),
        lacking=lacking,
        notes=(*there.notes, *_notes(parts, every, lacking, begun)),
    )


def _notes(
    parts: Sequence[tuple[Path, FileRows]],
    every: list[str],
    lacking: dict[Path, tuple[str, ...]],
    begun: bool,
) -> Iterator[str]:
    empty = [file for file, part in parts if not len(part.rows)]
    if empty and every:
        yield f"files without rows: {listed(empty)}"
    if lacking:
        absent = {name: [f for f, found in lacking.items() if name not in found] for name in every}
        named = listed(f"{name!r} ({listed(files, 2)})" for name, files in absent.items() if files)
        if begun:
            yield f"columns that the first rows of some files lack: {named}"
        else:
            yield f"columns that some files lack, empty in their rows: {named}"


def _joined(parts: Mapping[Path, Rows], every: list[str]) -> Rows:
    rows = list(parts.values())
    if len(rows) < 2:
        return rows[0] if rows else []
    if not all(hasattr(part, "features") for part in rows):
        return JoinedRows(rows, every)
    return join_tables(parts) or JoinedRows(rows, every)


def _load_hub(hub: tuple[str, str | None] | None, split: str, limit: int | None) -> Split | None:
    if hub is None:
        raise DataError("task.path: null, but this task has no data set on the Hub; give a path")
    import datasets

    name = "/".join(part for part in hub if part)
    try:
        # All splits at once: unlike a list of their names, this is served from the cache offline.
        splits = datasets.load_dataset(*hub)
    except Exception as error:  # offline, gated or missing: each comes as another type
        raise hub_failure(name, error) from error
    found = next((known for known in split_names(split) if known in splits), None)
    if found is None:
        return None
    rows = splits[found]
    fingerprint = str(getattr(rows, "_fingerprint", name))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
        fingerprint = f"{fingerprint}:{len(rows)}"
    return Split(split, rows, f"{name} ({split})", fingerprint)


def hub_failure(name: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"task: the Hub data set {name!r} cannot be loaded: {reason}; "
        "give a local copy as task.path, or check the network and HF_HUB_OFFLINE"
    )
