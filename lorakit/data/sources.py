"""Files or a Hub data set -> the rows of one split, each of which knows its file and row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
#: What a file of the split may be called in a directory.
ALIASES = {"validation": ("validation", "valid", "dev", "val")}

PathOption = str | list[str] | dict[str, str] | None
FileReader = Callable[[Path], Sequence[Mapping[str, Any]] | None]


@dataclass(frozen=True)
class Split:
    """The rows of one split.

    ``rows`` is a ``datasets.Dataset`` or a sequence of mappings; ``files`` are the files it came
    from, in order, with their row counts (empty for the Hub); ``fingerprint`` is a hash of the
    contents.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
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
        names = getattr(self.rows, "column_names", None)
        return tuple(names if names is not None else self.rows[0])

    def require(self, columns: Sequence[str]) -> None:
        """Raise DataError if a column is missing."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise DataError(
                f"{self.source}: no column {', '.join(map(repr, missing))}; "
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
        found = _load_hub(hub, split)
    else:
        files = split_files(path, split)
        found = _load_files(files, split, read_file) if files else None
    if found is None:
        return None
    if not len(found):
        raise DataError(f"{found.source}: the split {split!r} is empty")
    return found if limit is None else _first(found, limit)


def split_files(path: PathOption, split: str) -> list[Path]:
    """The files of a split: by name in a directory, as mapped, or ``train`` for a file or list."""
    if isinstance(path, dict):
        named = [Path(path[key]) for key in (split, *ALIASES.get(split, ())) if key in path][:1]
    elif isinstance(path, list):
        named = [Path(name) for name in path] if split == "train" else []
    elif path is not None and Path(path).is_dir():
        return _in_directory(Path(path), split)
    else:
        named = [Path(str(path))] if split == "train" or not Path(str(path)).exists() else []
    for file in named:
        if not file.is_file():
            raise DataError(f"task.path: no such file or directory: {file}")
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"task.path: {file}: unknown format; allowed: {', '.join(SUFFIXES)}")
    return named


def _in_directory(folder: Path, split: str) -> list[Path]:
    for name in ALIASES.get(split, (split,)):
        files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(
                f"{folder}: {' and '.join(file.name for file in files)} both name the split {split!r}"
            )
        if files:
            return files
    return []


def _load_files(files: list[Path], split: str, read_file: FileReader) -> Split:
    own = [read_file(file) for file in files]
    rows: Any
    if all(part is not None for part in own):
        parts = [list(part or ()) for part in own]
        counts = [len(part) for part in parts]
        rows = [row for part in parts for row in part]
    else:
        import datasets

        parts = [_read_with_datasets(file) for file in files]
        counts = [len(part) for part in parts]
        try:
            rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        except ValueError as error:
            raise DataError(f"task.path: the files' columns differ: {error}") from error
    return Split(
        name=split,
        rows=rows,
        source=", ".join(map(str, files)),
        fingerprint=_hash_files(files),
        files=tuple(zip(files, counts, strict=True)),
    )


def _read_with_datasets(file: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty")
    builder, options = {
        ".csv": ("csv", {"keep_default_na": False}),
        ".tsv": ("csv", {"sep": "\t", "quoting": 3, "keep_default_na": False}),
        ".parquet": ("parquet", {}),
    }.get(file.suffix, ("json", {}))
    try:
        return datasets.load_dataset(builder, data_files=str(file), split="train", **options)
    except Exception as error:  # datasets raises what its readers raise
        raise DataError(f"{file}: cannot be read: {_bad_row(file, error)}") from error


def _bad_row(file: Path, error: Exception) -> str:
    """The first row of a json file that does not parse, else the reader's own word."""
    if ".jsonl" in file.name:
        import gzip

        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"row {number} is not a JSON object"
        except OSError as broken:
            return str(broken)
        except ValueError as broken:
            return f"row {number}: {broken}"
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def _load_hub(hub: tuple[str, str | None] | None, split: str) -> Split | None:
    if hub is None:
        raise DataError("task.path: null, but this task has no data set on the Hub; give a path")
    import datasets

    name = "/".join(part for part in hub if part)
    try:
        available = datasets.get_dataset_split_names(*hub)
        if split not in available:
            return None
        rows = datasets.load_dataset(*hub, split=split)
    except Exception as error:  # offline, gated or missing: each comes as another type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"task: the Hub data set {name!r} cannot be loaded: {reason}; "
            "give a local copy as task.path, or check the network and HF_HUB_OFFLINE"
        ) from error
    return Split(split, rows, f"{name} ({split})", str(getattr(rows, "_fingerprint", name)))


def _first(found: Split, limit: int) -> Split:
    count = min(limit, len(found))
    rows: Any = found.rows
    rows = rows.select(range(count)) if hasattr(rows, "select") else rows[:count]
    return Split(found.name, rows, found.source, f"{found.fingerprint}:{count}", found.files)


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(handle.read())
    return digest.hexdigest()
