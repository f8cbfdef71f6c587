"""Interpret the names of data files: format, split, order, and sets of shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lorakit.data.compression import COMPRESSED
from lorakit.data.tables import TABLE_SUFFIXES
from lorakit.errors import DataError, listed
from lorakit.recipe.sections import SPLIT_ALIASES, SPLIT_NAMES

#: The split names that a file name may begin with, longest first.
_NAMES = sorted(
    [*SPLIT_NAMES, "test_matched", "test_mismatched"],
    key=len,
    reverse=True,
)
#: The part of a shard's name after the name of its split.
_NUMBERED = re.compile(
    r"[-_. ]?(part|shard|chunk)?[-_. ]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?"
)

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
#: The supported formats.
SUFFIXES = (
    *(text + packed for text in _TEXT for packed in ("", *COMPRESSED)),
    *TABLE_SUFFIXES,
)
#: Files that accompany data and contain no rows.
_ACCOMPANYING = re.compile(
    r"""(dataset_infos?|dataset_dict|state)\.json
    | .*\.tables\.jsonl(\.gz)?
    | _SUCCESS | _metadata | _common_metadata
    | (readme|license|licence|copying|citation|changelog|notice)(\.\w+)?
    | (checksums?|(md5|sha\d+)(sums?)?)(\.txt)?
    | .*\.(md|rst|md5|sha1|sha256|sha512|crc|sum|lock|py|ya?ml|toml|cff|ipynb|html?|pdf|db)
    | .*\.(png|jpe?g|gif|svg|log)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SHARD = re.compile(r"(?P<before>.*?)(?P<index>\d+)(?P<of>[-_.]of[-_.])(?P<count>\d+)(?P<after>.*)")
#: A larger number after ``-of-`` is not taken for a number of shards.
_MAX_SHARDS = 100_000


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file. Raises DataError for a dangling link instead of ignoring it."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path}: dangling symbolic link", about="task.path")
    return path.is_file()


def is_data(file: Path) -> bool:
    """Whether the file has a supported format and is neither hidden nor about the data."""
    return not accompanies_data(file) and suffix_of(file) is not None


def accompanies_data(file: Path) -> bool:
    """Whether the file is hidden or describes the data (README, checksums)."""
    return file.name.startswith(".") or _ACCOMPANYING.fullmatch(file.name) is not None


def suffix_of(file: Path) -> str | None:
    """The longest of ``SUFFIXES`` that the name ends with, if any."""
    return max((s for s in SUFFIXES if file.name.endswith(s)), key=len, default=None)


def stem_of(file: Path) -> str:
    """The name without its suffix."""
    return file.name.removesuffix(suffix_of(file) or "")


def split_names(split: str) -> tuple[str, ...]:
    """All names of a split, given any of them; its canonical name comes first."""
    return next((names for names in SPLIT_ALIASES.values() if split in names), (split,))


def named_after(stem: str) -> tuple[str, str] | None:
    """The split name that a file name begins with, and the rest; None if there is none."""
    folded = stem.replace("-", "_")
    for name in _NAMES:
        rest = stem[len(name) :]
        if folded.startswith(name) and re.match(r"[-_. 0-9]|$", rest):
            return name, rest
    return None


def is_number(rest: str) -> bool:
    """Whether ``rest``, from ``named_after``, is the number of a shard."""
    return _NUMBERED.fullmatch(rest) is not None


def saved_files(folder: Path) -> list[Path] | None:
    """The files, in order, of a ``Dataset`` that ``save_to_disk`` wrote to the folder; None if it
    did not. Raises DataError for a missing one, and if there is none."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not files:
        raise DataError(f"{folder}: the saved dataset has no rows", about="task.path")
    refuse_missing([file for file in files if not is_file(file)])
    return files


def check_format(file: Path) -> None:
    """Raise DataError if the name ends with none of ``SUFFIXES``."""
    if suffix_of(file) is None:
        raise DataError(f"{file}: unknown format", about="task.path", allowed=", ".join(SUFFIXES))


def in_order(files: Iterable[Path]) -> list[Path]:
    """Sort by path, comparing numbers in names by value: ``a-2`` before ``a-10``."""
    return sorted(files, key=lambda file: ([_natural(part) for part in file.parts], str(file)))


def _natural(text: str) -> list[str | int]:
    pieces = re.split(r"([0-9]+)", text)
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)]


def check_no_twins(files: Sequence[Path], key: Callable[[Path], object]) -> None:
    """Raise DataError if two files have the same ``key``: one is likely to be a copy of the other
    in another format."""
    seen: dict[object, Path] = {}
    for file in files:
        twin = seen.setdefault(key(file), file)
        if twin is not file:
            raise DataError(
                f"{twin} and {file.name} differ only in format; hint: keep one of them, or list "
                "the files to read",
                about="task.path",
            )


def missing_shards(files: Sequence[Path]) -> list[Path]:
    """The files missing from sets of shards (``train-00000-of-00002``), numbered from 0 or 1.

    Raises DataError if sets of different sizes have the same name, and for a number that is
    duplicate or out of range.
    """
    sets: dict[tuple[Path, str], list[tuple[Path, re.Match[str]]]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match and int(match["count"]) <= _MAX_SHARDS:
            sets.setdefault((file.parent, match["before"]), []).append((file, match))
    return [missing for shards in sets.values() for missing in _missing(shards)]


def _missing(shards: list[tuple[Path, re.Match[str]]]) -> list[Path]:
    first, count = shards[0][0], int(shards[0][1]["count"])
    present: dict[int, Path] = {}
    for file, match in shards:
        if int(match["count"]) != count:
            raise DataError(
                f"{first} and {file.name} are shards of different sets; hint: keep one set, or "
                "list the files to read",
                about="task.path",
            )
        twin = present.setdefault(int(match["index"]), file)
        if twin is not file:
            problem = f"{twin} and {file.name} are the same shard; hint: keep one"
            raise DataError(problem, about="task.path")
    start = 1 if count in present and 0 not in present else 0
    if beyond := [file for index, file in present.items() if index >= start + count]:
        raise DataError(
            f"{beyond[0]}: shard number out of range: there are {count} shards", about="task.path"
        )
    lacking = [index for index in range(start, start + count) if index not in present]
    return [_sibling(*shards[0], index) for index in lacking]


def _sibling(file: Path, match: re.Match[str], index: int) -> Path:
    number = f"{index:0{len(match['index'])}d}"
    return file.with_name(f"{match['before']}{number}{match['of']}{match['count']}{match['after']}")


def refuse_missing(missing: Sequence[Path]) -> None:
    """Raise DataError if any shard is missing."""
    if missing:
        raise DataError(f"missing shard: {listed(missing)}", about="task.path")
