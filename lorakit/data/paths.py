"""``task.path`` -> the files of a split.

A path is a directory whose files are named by split, or a file, a glob or a list of these (the
train split), or a mapping of splits to files. A path that exists is taken as it stands, whatever
characters are in it; only what does not exist is read as a glob.

The files of a split in a directory whose files are named by split.
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

from lorakit.data.file_names import (
    check_format,
    check_no_twins,
    in_order,
    is_beside,
    is_data,
    is_file,
    is_number,
    missing_shards,
    named_after,
    refuse_missing,
    split_names,
    stem_of,
)
from lorakit.errors import DataError, listed
from lorakit.recipe.sections import SPLIT_ALIASES, SPLIT_NAMES

PathOption = str | list[str] | dict[str, str | list[str]] | None


def split_files(path: PathOption, split: str) -> list[Path]:
    """The files of a split, as ``find_files`` finds them."""
    return find_files(path, split).files


def find_files(path: PathOption, split: str) -> SplitFiles:
    """The files of a split; a file, glob or list is the split ``train``.

    Raises DataError for a file that does not exist, a glob that matches no data file, an unknown
    format, a shard that is missing, a file that is listed twice, files that may or may not belong
    to the split, and a directory that cannot be read.
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
    """The error for a path without this split, which says what was found in its place."""
    if isinstance(path, dict):
        return DataError(f"task.path: no split {split!r}; allowed: {', '.join(path)}")
    if not (isinstance(path, str) and Path(path).is_dir()):
        return DataError(
            f"{_shown(path)}: no split {split!r}; allowed: train, or a mapping: "
            f"task.path: {{{split}: FILE}}"
        )
    there = [name for name in SPLIT_ALIASES if _seen(path, name)]
    allowed = f"; allowed: {', '.join(there)}" if there else ""
    inside = sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in Path(path).iterdir()
        if not entry.name.startswith(".")
    )
    holds = f"holds {listed(inside, 10)}" if inside else "is empty"
    return DataError(
        f"{path}: no split {split!r}{allowed}; the directory {holds}. A split's files are named "
        f"after it ({split}.jsonl, {split}-00000-of-00002.parquet); for other names give a file, "
        f"a glob or a mapping: task.path: {{{split}: FILE}}"
    )


def data_files(path: PathOption) -> list[Path]:
    """Every file that some split is read from, and what is named after a split beside them."""
    named = path if isinstance(path, dict) else {"train": path or []}
    entries = (
        e for value in named.values() for e in ([value] if isinstance(value, str) else value)
    )
    found = dict.fromkeys(file for file in map(Path, entries) if not file.is_dir())
    for split in SPLIT_ALIASES:
        try:
            found |= dict.fromkeys(split_files(path, split))
        except DataError:  # told when the split is loaded
            continue
    if isinstance(path, str) and Path(path).is_dir():
        inside = (file for file in Path(path).iterdir() if file.is_file())
        found |= dict.fromkeys(file for file in inside if named_after(file.name))
    return list(found)


def _seen(path: PathOption, split: str) -> bool:
    try:
        return bool(split_files(path, split))
    except DataError:
        return True


def _shown(path: PathOption) -> str:
    return listed(path) if isinstance(path, list) else str(path)


# A file, a glob or a list of them


def _listed(entries: str | list[str]) -> SplitFiles:
    """The files that the entries name, in their order; those of a glob in natural order."""
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
            twin = files.setdefault(_place(file), file)
            if twin is not file:
                raise DataError(f"task.path: {file} is listed twice")
    missing = [file for file in _left_out(literal) if _place(file) not in files]
    if missing:
        notes.append(f"task.path: shards that are not listed: {listed(missing)}")
    return SplitFiles(list(files.values()), tuple(notes))


def _place(file: Path) -> str:
    """Where a file is, however it was named; links are not followed, as caches link equal files."""
    return os.path.normpath(file.absolute())


def _left_out(files: list[Path]) -> list[Path]:
    """The other shards of the sets that listed files belong to: a list may be a part on purpose."""
    try:
        return missing_shards(files)
    except DataError:
        return []


def _existing(entry: str) -> Path:
    file = Path(entry)
    if file.is_dir():
        raise DataError(
            f"task.path: {file} is a directory; allowed here: a file, or a glob ({file / '*'})"
        )
    if not file.is_file():
        raise DataError(f"task.path: no such file or directory: {entry}")
    check_format(file)
    return file


def _matching(pattern: str) -> list[Path]:
    """The data files that match; what only describes data (README, checksums) is passed over."""
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 (Path's takes no absolute pattern)
    matches = in_order(filter(is_file, map(Path, names)))
    files = [file for file in matches if not is_beside(file)]
    if not files:
        held = f" but {listed(matches)}" if matches else ""
        raise DataError(f"task.path: {pattern!r}: the glob matches no data file{held}")
    for file in files:
        check_format(file)
    check_no_twins(files, lambda file: str(file).removesuffix(".gz"))
    # A glob may pick some shards of a set on purpose; one that it would match is a loss.
    wide = os.path.normpath(pattern).replace("**/", "*")
    refuse_missing([file for file in missing_shards(files) if fnmatch(str(file), wide)])
    return files


# A mapping


def _mapped(path: dict[str, str | list[str]], split: str) -> SplitFiles:
    for key in path:
        if key not in SPLIT_NAMES:
            raise DataError(f"task.path: unknown split {key!r}; allowed: {', '.join(SPLIT_NAMES)}")
    keys = [name for name in split_names(split) if name in path]
    if len(keys) > 1:
        raise DataError(
            f"task.path: {' and '.join(keys)} both name the split {split_names(split)[0]!r}"
        )
    if not keys:
        return SplitFiles([])
    found = _listed(path[keys[0]])
    return SplitFiles(found.files, (*found.notes, *_shared_with(path, keys[0], found.files)))


def _shared_with(path: dict[str, str | list[str]], key: str, files: list[Path]) -> Iterator[str]:
    """A note for each other split that files of the train split are in too."""
    own = {_place(file) for file in files}
    for other in path if key == "train" else ():
        try:
            theirs = _listed(path[other]).files if other != key else []
        except DataError:  # told when that split is loaded
            continue
        if both := [file for file in theirs if _place(file) in own]:
            yield f"task.path: in both {key} and {other}: {listed(both)}"


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split in order; ``notes`` say what was chosen or left out for the user."""

    files: list[Path]
    notes: tuple[str, ...] = ()


def in_directory(folder: Path, split: str) -> SplitFiles:
    """The split's files, in the directory itself, in ``data`` inside it, or in a directory that is
    named by the split in one of these."""
    places: list[SplitFiles] = []
    for place in (folder, folder / "data"):
        if place.is_dir():
            places.append(_by_name(place, split))
            inside = [place / name for name in split_names(split) if (place / name).is_dir()]
            places += [_whole_directory(found) for found in inside]
    found = [place for place in places if place.files]
    if len(found) > 1:
        names = " and ".join(str(place.files[0].relative_to(folder)) for place in found)
        raise _both(folder, names, split)
    return found[0] if found else SplitFiles([])


def _by_name(folder: Path, split: str) -> SplitFiles:
    """``SPLIT.jsonl``, or its shards; without these, whatever begins with ``SPLIT`` and a
    delimiter."""
    names = split_names(split)
    inside = in_order(file for file in folder.iterdir() if is_data(file) and is_file(file))
    named = {file: found for file in inside if (found := named_after(stem_of(file)))}
    files = [file for file, (name, _) in named.items() if name in names]
    exact = [file for file in files if not named[file][1]]
    shards = [file for file in files if is_number(named[file][1])]
    for first, second in pairwise(files):
        if named[first][0] != named[second][0]:
            raise _both(folder, f"{first.name} and {second.name}", split)
    if len(exact) > 1 or (exact and shards):
        raise _both(folder, f"{exact[0].name} and {[*exact[1:], *shards][0].name}", split)
    chosen = exact or shards or files
    split_files = SplitFiles(exact)
    if not exact:
        split_files = _checked(folder, chosen, f"the split {names[0]!r} is")
    if left := [file.name for file in files if file not in chosen]:
        note = f"{folder}: not read beside {chosen[0].name}: {listed(left)}"
        return replace(split_files, notes=(*split_files.notes, note))
    return split_files


def _whole_directory(folder: Path) -> SplitFiles:
    """Every file of a directory that is named by a split, at any depth."""
    pattern = f"{glob.escape(str(folder))}/**/*"
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 (it follows links, Path's does not)
    files = in_order(file for file in map(Path, names) if is_file(file) and not is_beside(file))
    for file in files:
        check_format(file)
    return _checked(folder, files, "holds")


def _checked(folder: Path, files: list[Path], what: str) -> SplitFiles:
    check_no_twins(files, lambda file: file.with_name(stem_of(file)))
    refuse_missing(missing_shards(files))
    names = [file.relative_to(folder) for file in files]
    note = f"{folder}: {what} {len(files):,} file{'s' * (len(files) > 1)}: {listed(names)}"
    return SplitFiles(files, (note,) if files else ())


def _both(folder: Path, names: str, split: str) -> DataError:
    return DataError(
        f"{folder}: {names} both name the split {split_names(split)[0]!r}; keep one, or map the "
        "splits to their files in task.path"
    )
