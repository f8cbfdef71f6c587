"""Find the files of a split in a directory whose files are named after splits."""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

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


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split, in order; ``notes`` tell the user which were chosen and ignored."""

    files: list[Path]
    notes: tuple[str, ...] = ()


def in_directory(folder: Path, split: str) -> SplitFiles:
    """The split's files: in the directory, in its subdirectory ``data``, or in a subdirectory of
    either that is named after the split. A saved ``datasets.Dataset`` is the training split."""
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
        f"{folder}: {names} both name split {split_names(split)[0]!r}; hint: keep one of them, or "
        "map splits to files in task.path",
        about="task.path",
    )
