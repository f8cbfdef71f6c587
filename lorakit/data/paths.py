"""Find the files of a split in ``task.path``.

A path is a directory whose files are named after splits; a file, a glob or a list of these, which
is the train split; or a mapping of splits to files. A path that exists is used literally, whatever
characters it contains; only one that does not exist is treated as a glob.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

from lorakit.data.compression import without_compression
from lorakit.data.file_names import (
    accompanies_data,
    check_format,
    check_no_twins,
    in_order,
    is_data,
    is_file,
    is_number,
    missing_shards,
    named_after,
    refuse_missing,
    saved_files,
    split_names,
    stem_of,
)
from lorakit.errors import DataError, listed
from lorakit.recipe.sections import SPLIT_ALIASES, split_name_errors

#: The values of ``task.path``.
PathOption = str | list[str] | dict[str, str | list[str]] | None


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split, in order; ``notes`` tell the user which were chosen and ignored."""

    files: list[Path]
    notes: tuple[str, ...] = ()


def split_files(path: PathOption, split: str) -> list[Path]:
    """The files that ``find_files`` finds."""
    return find_files(path, split).files


def find_files(path: PathOption, split: str) -> SplitFiles:
    """Find the files of a split; a file, a glob or a list is the split ``train``.

    Raises DataError for a missing file, a glob that matches no data file, an unknown format, a
    missing shard, a duplicate file, an unknown split name, files that may or may not belong to the
    split, and a directory that cannot be read.
    """
    try:
        if isinstance(path, dict):
            return _mapped(path, split)
        if isinstance(path, str) and Path(path).is_dir():
            return in_directory(Path(path), split)
        found = _listed(path or [])
    except OSError as error:
        raise DataError(f"task.path: cannot be read: {error}") from error
    return found if split == "train" else SplitFiles([])


def no_split(path: PathOption, split: str) -> DataError:
    """Return the error for a path without this split, which lists what the path has instead."""
    if isinstance(path, dict):
        return DataError(f"task.path: no split {split!r}; allowed: {', '.join(path)}")
    if not (isinstance(path, str) and Path(path).is_dir()):
        return DataError(
            f"task.path: {_shown(path)}: no split {split!r}; allowed: train, or a mapping: "
            f"task.path: {{{split}: FILE}}"
        )
    available = [name for name in SPLIT_ALIASES if _has_split(path, name)]
    allowed = f"; allowed: {', '.join(available)}" if available else ""
    inside = sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in Path(path).iterdir()
        if not entry.name.startswith(".")
    )
    contents = f"contains {listed(inside, 10)}" if inside else "is empty"
    return DataError(
        f"task.path: {path}: no split {split!r}{allowed}; the directory {contents}; hint: name a "
        f"split's files after it ({split}.jsonl, {split}-00000-of-00002.parquet), or give a file, "
        f"a glob or a mapping: task.path: {{{split}: FILE}}"
    )


def data_files(path: PathOption) -> list[Path]:
    """The files of all splits, and any other files in the directory that are named after one."""
    named = path if isinstance(path, dict) else {"train": path or []}
    entries = (
        e for value in named.values() for e in ([value] if isinstance(value, str) else value)
    )
    found = dict.fromkeys(file for file in map(Path, entries) if not file.is_dir())
    for split in SPLIT_ALIASES:
        try:
            found |= dict.fromkeys(split_files(path, split))
        except DataError:  # reported when that split is loaded
            continue
    if isinstance(path, str) and Path(path).is_dir():
        inside = (file for file in Path(path).iterdir() if file.is_file())
        found |= dict.fromkeys(file for file in inside if named_after(file.name))
    return list(found)


def _has_split(path: PathOption, split: str) -> bool:
    try:
        return bool(split_files(path, split))
    except DataError:
        return True


def _shown(path: PathOption) -> str:
    return listed(path) if isinstance(path, list) else str(path)


# A file, a glob or a list of them


def _listed(entries: str | list[str]) -> SplitFiles:
    """The files of all entries, in their order; those of a glob in natural order."""
    files: dict[str, Path] = {}
    notes: list[str] = []
    literal: list[Path] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        if Path(entry).exists() or not re.search(r"[*?\[]", entry):
            literal.append(_existing(entry))
            found = literal[-1:]
        else:
            found = _matching(entry)
            notes.append(f"task.path: {entry}: {len(found):,} files: {listed(found)}")
        for file in found:
            twin = files.setdefault(_location(file), file)
            if twin is not file:
                raise DataError(f"task.path: duplicate file {file}")
    missing = [file for file in _left_out(literal) if _location(file) not in files]
    if missing:
        notes.append(f"task.path: shards not listed: {listed(missing)}")
    return SplitFiles(list(files.values()), tuple(notes))


def _location(file: Path) -> str:
    """The file's location, however it was written. Links are not resolved, because caches link
    files with equal contents."""
    return os.path.normpath(file.absolute())


def _left_out(files: list[Path]) -> list[Path]:
    """The missing shards of the sets that listed files belong to, which is not an error: the list
    may be a subset on purpose."""
    try:
        return missing_shards(files)
    except DataError:
        return []


def _existing(entry: str) -> Path:
    file = Path(entry)
    if file.is_dir():
        raise DataError(
            f"task.path: {file}: is a directory; allowed: a file, or a glob ({file / '*'})"
        )
    if not file.is_file():
        raise DataError(f"task.path: {entry}: no such file or directory")
    check_format(file)
    return file


def _matching(pattern: str) -> list[Path]:
    """The data files that match, except files about the data (README, checksums)."""
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 (Path's takes no absolute pattern)
    matches = in_order(filter(is_file, map(Path, names)))
    files = [file for file in matches if not accompanies_data(file)]
    if not files:
        matched = f", only {listed(matches)}" if matches else ""
        raise DataError(f"task.path: {pattern}: the glob matches no data file{matched}")
    for file in files:
        check_format(file)
    check_no_twins(files, lambda file: without_compression(str(file)))
    # A glob may select some shards of a set on purpose, but one that it would match is missing.
    wide = os.path.normpath(pattern).replace("**/", "*")
    refuse_missing([file for file in missing_shards(files) if fnmatch(str(file), wide)])
    return files


# A mapping


def _mapped(path: dict[str, str | list[str]], split: str) -> SplitFiles:
    for message, allowed in split_name_errors(path):
        raise DataError(f"task.path: {message}; allowed: {allowed}")
    key = next((name for name in split_names(split) if name in path), None)
    if key is None:
        return SplitFiles([])
    found = _listed(path[key])
    return SplitFiles(found.files, (*found.notes, *_shared_with(path, key, found.files)))


def _shared_with(path: dict[str, str | list[str]], key: str, files: list[Path]) -> Iterator[str]:
    """Yield a note for each other split that shares files with the train split."""
    locations = {_location(file) for file in files}
    for other in path if key == "train" else ():
        try:
            theirs = _listed(path[other]).files if other != key else []
        except DataError:  # reported when that split is loaded
            continue
        if both := [file for file in theirs if _location(file) in locations]:
            yield f"task.path: in both {key} and {other}: {listed(both)}"


# A directory


def in_directory(folder: Path, split: str) -> SplitFiles:
    """The split's files: in the directory, in its subdirectory ``data``, or in a subdirectory of
    either that is named after the split. A saved ``datasets.Dataset`` is the train split."""
    if (saved := saved_files(folder)) is not None:
        return SplitFiles(saved if split == "train" else [])
    places: list[SplitFiles] = []
    for place in (folder, folder / "data"):
        if place.is_dir():
            places.append(_by_name(place, split))
            inside = [place / name for name in split_names(split) if (place / name).is_dir()]
            places += [_all_files(found) for found in inside]
    found = [place for place in places if place.files]
    if len(found) > 1:
        names = " and ".join(str(place.files[0].relative_to(folder)) for place in found)
        raise _ambiguous(folder, names, split)
    return found[0] if found else SplitFiles([])


def _by_name(folder: Path, split: str) -> SplitFiles:
    """``SPLIT.jsonl``, or its shards, or else all files that begin with ``SPLIT`` and a
    delimiter."""
    names = split_names(split)
    inside = in_order(file for file in folder.iterdir() if is_data(file) and is_file(file))
    named = {file: found for file in inside if (found := named_after(stem_of(file)))}
    files = [file for file, (name, _) in named.items() if name in names]
    exact = [file for file in files if not named[file][1]]
    shards = [file for file in files if is_number(named[file][1])]
    for first, second in pairwise(files):
        if named[first][0] != named[second][0]:
            raise _ambiguous(folder, f"{first.name} and {second.name}", split)
    if len(exact) > 1 or (exact and shards):
        raise _ambiguous(folder, f"{exact[0].name} and {[*exact[1:], *shards][0].name}", split)
    chosen = exact or shards or files
    chosen_files = SplitFiles(exact)
    if not exact:
        chosen_files = _checked(folder, chosen, f"the split {names[0]!r} is")
    if ignored := [file.name for file in files if file not in chosen]:
        note = f"{folder}: ignored in favor of {chosen[0].name}: {listed(ignored)}"
        return replace(chosen_files, notes=(*chosen_files.notes, note))
    return chosen_files


def _all_files(folder: Path) -> SplitFiles:
    """All files, at any depth, in a directory that is named after a split."""
    if saved := saved_files(folder):
        return _checked(folder, saved, "contains")
    pattern = f"{glob.escape(str(folder))}/**/*"
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 (it follows links, Path's does not)
    files = in_order(
        file for file in map(Path, names) if is_file(file) and not accompanies_data(file)
    )
    for file in files:
        check_format(file)
    return _checked(folder, files, "contains")


def _checked(folder: Path, files: list[Path], what: str) -> SplitFiles:
    check_no_twins(files, lambda file: file.with_name(stem_of(file)))
    refuse_missing(missing_shards(files))
    names = [file.relative_to(folder) for file in files]
    note = f"{folder}: {what} {len(files):,} file{'s' * (len(files) > 1)}: {listed(names)}"
    return SplitFiles(files, (note,) if files else ())


def _ambiguous(folder: Path, names: str, split: str) -> DataError:
    return DataError(
        f"task.path: {folder}: {names} both name split {split_names(split)[0]!r}; hint: keep one "
        "of them, or map splits to files in task.path"
    )
