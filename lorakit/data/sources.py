"""Files or a Hub data set -> the rows of one split, each of which knows its file and row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data.files import SUFFIXES, FileRows, read_rows
from lorakit.data.parquet import file_digest
from lorakit.data.rows import JoinedRows, Rows, column_names
from lorakit.errors import DataError

_VALIDATION = ("validation", "valid", "dev", "val")
#: What a split may be called in a directory or a mapping; the first name is its own.
ALIASES = {
    "train": ("train",),
    "validation": _VALIDATION,
    "test": ("test",),
    "validation_matched": ("validation_matched",),
    "validation_mismatched": ("validation_mismatched",),
}

PathOption = str | list[str] | dict[str, str] | None
FileReader = Callable[[Path], Rows | None]


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    ``rows`` is a ``datasets.Dataset`` or a sequence of mappings; ``files`` are the files it came
    from, in order, with their row counts (empty for the Hub); ``fingerprint`` is a hash of the
    contents.
    """

    name: str
    rows: Rows
    source: str
    fingerprint: str
    files: tuple[tuple[Path, int], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rows)

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
        return [row[name] for row in self.rows]

    def require(self, columns: Sequence[str]) -> None:
        """Raise DataError if a column is missing."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise DataError(
                f"{self.source}: no column{'s' if len(missing) > 1 else ''} "
                f"{', '.join(map(repr, missing))}; "
                f"the columns are {', '.join(map(repr, self.columns))}"
            )


def load_split(
    path: PathOption,
    split: str,
    hub: tuple[str, str | None] | None = None,
    read_file: FileReader = lambda file: None,
    limit: int | None = None,
) -> Split | None:
    """The split's rows, or None if the source has no such split.

    Raises DataError if ``path`` does not exist, a file cannot be read, the split is empty, or
    neither ``path`` nor ``hub`` is given.
    """
    if path is None:
        found = _load_hub(hub, split, limit)
    else:
        files = split_files(path, split)
        found = _load_files(files, split, read_file, limit) if files else None
    if found is None:
        return None
    if not len(found):
        raise DataError(f"{found.source}: the split {split!r} is empty")
    return found


def split_files(path: PathOption, split: str) -> list[Path]:
    """The files of a split: by name in a directory, as mapped, or ``train`` for a file or list.

    Raises DataError if one does not exist or has another format, or if two names in a directory or
    mapping mean the same split.
    """
    if isinstance(path, dict):
        named = _mapped(path, split)
    elif isinstance(path, list):
        named = [Path(name) for name in path] if split == "train" else []
    elif path is not None and Path(path).is_dir():
        return _in_directory(Path(path), split)
    else:
        named = [Path(str(path))] if split == "train" or not Path(str(path)).exists() else []
    for file in named:
        if file.is_dir():
            raise DataError(f"task.path: {file} is a directory; allowed here: a file")
        if not file.is_file():
            raise DataError(f"task.path: no such file or directory: {file}")
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"task.path: {file}: unknown format; allowed: {', '.join(SUFFIXES)}")
    return named


def split_names(split: str) -> tuple[str, ...]:
    """What the split may be called, whichever of its names it is asked for by."""
    return next((names for names in ALIASES.values() if split in names), (split,))


def _mapped(path: dict[str, str], split: str) -> list[Path]:
    known = [name for names in ALIASES.values() for name in names]
    for key in path:
        if key not in known:
            raise DataError(f"task.path: unknown split {key!r}; allowed: {', '.join(known)}")
    keys = [name for name in split_names(split) if name in path]
    if len(keys) > 1:
        raise DataError(
            f"task.path: {' and '.join(keys)} both name the split {split_names(split)[0]!r}"
        )
    return [Path(path[key]) for key in keys]


def _in_directory(folder: Path, split: str) -> list[Path]:
    candidates = [folder / f"{name}{suffix}" for name in split_names(split) for suffix in SUFFIXES]
    files = [file for file in candidates if file.is_file()]
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise DataError(
            f"{folder}: {names} both name the split {split_names(split)[0]!r}; keep one"
        )
    return files


def _load_files(files: list[Path], split: str, read_file: FileReader, limit: int | None) -> Split:
    parts: list[FileRows] = []
    left = limit
    for file in files:
        if left == 0:
            break
        parts.append(_load_file(file, read_file, left))
        if left is not None:
            left -= len(parts[-1].rows)
    digest = hashlib.sha256("\n".join(part.digest for part in parts).encode())
    return Split(
        name=split,
        rows=_joined([part.rows for part in parts if len(part.rows)]),
        source=", ".join(map(str, files)),
        fingerprint=digest.hexdigest(),
        files=tuple((file, len(part.rows)) for file, part in zip(files, parts, strict=False)),
    )


def _load_file(file: Path, read_file: FileReader, limit: int | None) -> FileRows:
    own = read_file(file)
    if own is None:
        return read_rows(file, limit)
    rows = own if limit is None else own[:limit]
    return FileRows(rows, f"{file_digest(file)}:{len(rows)}")


def _joined(parts: list[Rows]) -> Rows:
    """The rows of all files one after another, with the columns that all of them have."""
    if len(parts) < 2:
        return parts[0] if parts else []
    names = [column_names(part) for part in parts]
    common = shared_columns(names)
    if not all(hasattr(part, "features") for part in parts):
        return JoinedRows(parts, common)
    import datasets

    try:
        return datasets.concatenate_datasets(  # type: ignore[no-any-return]
            [part.select_columns(common) for part in parts]  # type: ignore[attr-defined]
        )
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"task.path: a column's type differs between files: {reason}") from error


def shared_columns(names: Sequence[Sequence[str]]) -> list[str]:
    """Those that all files have, in the order of the first. Raises DataError if there is none."""
    common = [name for name in names[0] if all(name in others for others in names)]
    if not common:
        raise DataError("task.path: the files have no column in common")
    return common


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
