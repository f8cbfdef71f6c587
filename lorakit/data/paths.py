"""Find the rows of a split in ``task.path``.

A path is a directory whose files are named after splits; a file, a glob or a list of files, globs
and directories, which is the training split; or a mapping of splits to these. In place of a path, a
source with keys adds a weight, or names a dataset on the Hub. A path that exists is used
literally, whatever characters it contains; only one that does not exist is treated as a glob.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from lorakit.data.compression import without_compression
from lorakit.data.directories import SplitFiles, in_directory
from lorakit.data.file_names import (
    accompanies_data,
    check_format,
    check_no_twins,
    in_order,
    is_file,
    missing_shards,
    named_after,
    refuse_missing,
    saved_files,
    split_names,
    suffix_of,
)
from lorakit.data.hub import HubSplit
from lorakit.errors import DataError, listed, shown
from lorakit.recipe.data_path import DataSource, PathOption, Sources, listed_sources
from lorakit.recipe.sections import SPLIT_ALIASES, split_name_errors

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A part of a split's rows: files or, if ``hub`` is set, a dataset on the Hub. ``weight`` is
    its share of an epoch, relative to the other sources; None if the recipe gives no weights."""

    label: str
    found: SplitFiles
    hub: HubSplit | None = None
    weight: float | None = None


def find_sources(path: PathOption, split: str) -> list[Source]:
    """Find the sources of a split, in order; a single one for all files unless they have weights,
    which apply to the training split.

    Raises the same errors as ``find_files``.
    """
    found = find_files(path, split)
    key, given = _given(path, split)
    weights = [source.weight for source in given if isinstance(source, DataSource)]
    weighted = split == "train" and any(weights)
    if not weighted and not any(map(_hub_split, given)):
        return [Source(listed(found.files), found)] if found.files else []
    each = [_source(source, split, key, weighted) for source in given]
    sources = [source for source in each if source is not None]
    _check_distinct(file for source in sources for file in source.found.files)
    for source in sources[:1]:  # the notes are about the files of all sources
        sources[0] = replace(source, found=replace(source.found, notes=found.notes))
    return sources


def _source(given: str | DataSource, split: str, key: str | None, weighted: bool) -> Source | None:
    weight = (getattr(given, "weight", None) or 1.0) if weighted else None
    hub = _hub_split(given)
    if hub is not None:
        required = key is not None or split == "train"
        if hub.split and not required:
            return None
        hub, label = replace(hub, required=required), hub.label(split)
        return Source(label, SplitFiles([Path(label)]), hub, weight)
    files = _listed([given], split, key).files
    return Source(listed(files), SplitFiles(files), None, weight) if files else None


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
        if isinstance(path, str) and Path(path).is_dir():
            return in_directory(Path(path), split)
        key, given = _given(path, split)
        found = _listed(given, split, key)
        if isinstance(path, dict) and key is not None:
            notes = (*found.notes, *_shared_with(path, key, found.files))
            return SplitFiles(found.files, notes)
    except OSError as error:
        raise DataError(f"cannot be read: {error}", about="task.path") from error
    return found


def _given(path: PathOption, split: str) -> tuple[str | None, list[str | DataSource]]:
    """What the recipe gives for a split; in a mapping, also its name there."""
    if not isinstance(path, dict):
        return None, listed_sources(path or [])
    for message, allowed in split_name_errors(path):
        raise DataError(message, about="task.path", allowed=allowed)
    key = next((name for name in split_names(split) if name in path), None)
    return key, [] if key is None else listed_sources(path[key])


def _hub_split(source: str | DataSource) -> HubSplit | None:
    """The dataset on the Hub that a source names, by its split or configuration."""
    if not isinstance(source, DataSource) or not (source.name or source.split):
        return None
    path = source.path
    if not isinstance(path, str) or Path(path).exists() or suffix_of(Path(path)):
        return None
    return HubSplit(path, source.name, source.split) if _HUB_NAME.fullmatch(path) else None


def no_split(path: PathOption, split: str) -> DataError:
    """Return the error for a path without this split, which lists what the path has instead."""
    if isinstance(path, dict):
        return DataError(f"no split {split!r}", about="task.path", allowed=", ".join(path))
    if isinstance(path, str) and Path(path).is_dir():
        return _not_in_directory(path, split)
    return DataError(
        f"{_shown(path)}: no split {split!r}",
        about="task.path",
        allowed=f"train, or a mapping: task.path: {{{split}: FILE}}",
    )


def _not_in_directory(path: str, split: str) -> DataError:
    available = [name for name in SPLIT_ALIASES if _has_split(path, name)]
    inside = sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in Path(path).iterdir()
        if not entry.name.startswith(".")
    )
    contents = f"contains {listed(inside, 10)}" if inside else "is empty"
    problem = f"{path}: no split {split!r}"
    rest = (  # which is the end of the message, also after what is allowed
        f"the directory {contents}; hint: name a split's files after it ({split}.jsonl, "
        f"{split}-00000-of-00002.parquet), or give a file, a glob or a mapping: "
        f"task.path: {{{split}: FILE}}"
    )
    if not available:
        return DataError(f"{problem}; {rest}", about="task.path")
    return DataError(problem, about="task.path", allowed=f"{', '.join(available)}; {rest}")


def data_files(path: PathOption) -> list[Path]:
    """The files of all splits, and any other files in the directory that are named after one."""
    values = path.values() if isinstance(path, dict) else [path or []]
    found = dict.fromkeys(
        Path(entry)
        for value in values
        for source in listed_sources(value)
        for entry in _paths(source)
        if not Path(entry).is_dir()
    )
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


def _paths(source: str | DataSource) -> list[str]:
    path = source if isinstance(source, str) else source.path
    return [path] if isinstance(path, str) else path


def _shown(path: PathOption) -> str:
    if isinstance(path, list | DataSource):
        return listed([entry for source in listed_sources(path) for entry in _paths(source)])
    return str(path)


# Files, globs, directories and lists of them


def _listed(given: Sequence[str | DataSource], split: str, key: str | None) -> SplitFiles:
    """The files of all sources that are not on the Hub, in their order; those of a glob in natural
    order. ``key`` is the name of the split in a mapping."""
    parts = [
        _found(entry, source, split, key)
        for source in given
        if _hub_split(source) is None
        for entry in _paths(source)
    ]
    files = [file for part in parts for file in part.files]
    _check_distinct(files)
    notes = [note for part in parts for note in part.notes]
    named = {_location(file) for file in files}
    single = [file for part in parts if not part.notes for file in part.files]
    if missing := [file for file in _left_out(single) if _location(file) not in named]:
        notes.append(f"task.path: shards not listed: {listed(missing)}")
    return SplitFiles(files, tuple(notes))


def _found(entry: str, source: str | DataSource, split: str, key: str | None) -> SplitFiles:
    """The files of the split in one file, glob or directory."""
    own_split = source.split if isinstance(source, DataSource) else None
    is_asked = key is not None or split == "train"
    if isinstance(source, DataSource) and source.name and Path(entry).exists():
        raise DataError(
            f"{entry}: name = {shown(source.name)}, but only datasets on the Hub have "
            "configurations, and this is a local path",
            about="task.path",
            allowed="no name",
        )
    if Path(entry).is_dir():
        if own_split and not is_asked:
            return SplitFiles([])
        whole = saved_files(Path(entry)) if key is not None and own_split is None else None
        found = SplitFiles(whole) if whole else in_directory(Path(entry), own_split or split)
        if is_asked and not found.files:
            raise _not_in_directory(entry, own_split or split)
        return found
    if not Path(entry).exists() and re.search(r"[*?\[]", entry):
        files = _matching(entry)
        found = SplitFiles(files, (f"task.path: {entry}: {len(files):,} files: {listed(files)}",))
    else:
        found = SplitFiles([_existing(entry)])
    if own_split:
        raise DataError(
            f"{entry}: split = {shown(own_split)}, but a file has no splits",
            about="task.path",
            allowed="no split, or a directory or a dataset on the Hub",
        )
    return found if is_asked else SplitFiles([])


def _check_distinct(files: Iterable[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if seen.setdefault(_location(file), file) is not file:
            raise DataError(f"duplicate file {file}", about="task.path")


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
    if not file.is_file():
        if file.exists():
            problem = f"{entry}: is a device or a pipe"
            raise DataError(problem, about="task.path", allowed="a data file")
        hint = ""
        if _HUB_NAME.fullmatch(entry) and suffix_of(file) is None:
            hint = (
                "; hint: set the path (--set task.path=PATH), or name a split of a dataset on the "
                f"Hub: {{path: {entry}, split: train}}"
            )
        raise DataError(f"{entry}: no such file or directory{hint}", about="task.path")
    check_format(file)
    return file


def _matching(pattern: str) -> list[Path]:
    """The data files that match, except files about the data (README, checksums)."""
    names = glob.iglob(pattern, recursive=True)  # noqa: PTH207 (Path's takes no absolute pattern)
    matches = in_order(filter(is_file, map(Path, names)))
    files = [file for file in matches if not accompanies_data(file)]
    if not files:
        matched = f", only {listed(matches)}" if matches else ""
        raise DataError(f"{pattern}: the glob matches no data file{matched}", about="task.path")
    for file in files:
        check_format(file)
    check_no_twins(files, lambda file: without_compression(str(file)))
    # A glob may select some shards of a set on purpose, but one that it would match is missing.
    wide = os.path.normpath(pattern).replace("**/", "*")
    refuse_missing([file for file in missing_shards(files) if fnmatch(str(file), wide)])
    return files


# A mapping


def _shared_with(path: dict[str, Sources], key: str, files: list[Path]) -> Iterator[str]:
    """Yield a note for each other split that shares files with the training split."""
    locations = {_location(file) for file in files}
    for other in path if key == "train" else ():
        try:
            given = listed_sources(path[other])
            theirs = _listed(given, other, other).files if other != key else []
        except DataError:  # reported when that split is loaded
            continue
        if both := [file for file in theirs if _location(file) in locations]:
            yield f"task.path: in both {key} and {other}: {listed(both)}"
