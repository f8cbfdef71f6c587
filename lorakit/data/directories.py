"""The files of a split in a directory whose files are named by split."""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
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
