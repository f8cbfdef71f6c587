"""The texts to predict on: given directly, as rows, or in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.examples import ClassificationExample
from lorakit.data.file_names import SUFFIXES, suffix_of
from lorakit.data.files import read_rows
from lorakit.data.rows import Row
from lorakit.data.sources import Split
from lorakit.errors import DataError, UserError
from lorakit.tasks.base import required_text
from lorakit.tasks.labelling import listed_values

#: A text, a pair of texts, or a row.
Given = str | tuple[str, str] | Mapping[str, Any]

_TEXT, _PAIR = ("text",), ("text", "text_pair")
#: The columns of a text, or of a pair of texts, in common datasets.
_COMMON = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    _PAIR,
    _TEXT,
    ("sentence",),
)
#: Columns that are not the text if there is another one.
_NOT_TEXT = ("label", "labels", "tags", "idx", "id")
_HINT = "--text-column and --text-pair-column, in Python text_column= and text_pair_column="


@dataclass(frozen=True)
class InputRows:
    """``columns`` of ``split`` are the text and, for pairs, the second text. With ``joins_words`` a
    text may be a list of words, which are joined by spaces."""

    split: Split
    columns: tuple[str, ...]
    joins_words: bool = False

    def example(self, row: Row) -> ClassificationExample:
        """The texts of a row; 0 stands for the label, which it does not have."""
        if self.joins_words:
            row = {name: _joined(row.get(name)) for name in self.columns}
        text, *pair = (_utf8_text(row, name) for name in self.columns)
        return ClassificationExample(text, pair[0] if pair else None, 0)


def given_rows(
    texts: Sequence[Given], text: str | None, pair: str | None, trained: Sequence[str]
) -> InputRows:
    """The texts; the columns of rows are those of ``find_columns``.

    Raises DataError if there are none, or if they are of different kinds.
    """
    if not texts:
        raise DataError("texts = []: allowed: at least one text, pair of texts or row")
    kinds = {_kind(given) for given in texts}
    if len(kinds) > 1:
        raise DataError(f"texts: {' and '.join(sorted(kinds))}; allowed: one of these kinds")
    split = Split("texts", [_row(given) for given in texts], "texts", "")
    if kinds == {"rows"} or text is not None or pair is not None:
        return InputRows(split, find_columns(split, text, pair, trained))
    return InputRows(split, _TEXT if kinds == {"texts"} else _PAIR)


def file_rows(file: str | Path) -> Split:
    """The rows of a csv, tsv, json, JSON Lines or parquet file. Raises DataError if it cannot be
    read, with the row if it is known, or has no rows."""
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    if suffix_of(file) is None:
        raise DataError(f"{file}: unknown format; allowed: {', '.join(SUFFIXES)}")
    found = read_rows(file)
    if not len(found.rows):
        raise DataError(f"{file}: the file has no rows")
    return Split("input", found.rows, str(file), found.digest, ((file, len(found.rows)),))


def find_columns(
    split: Split, text: str | None, pair: str | None, trained: Sequence[str]
) -> tuple[str, ...]:
    """Return the columns of the texts: ``text`` and ``pair`` if they are named; else those that the
    model was ``trained`` on (empty if unknown), or the only ones with a common name, or, if they
    are unknown, the only column besides label and index.

    Raises DataError if a named column is missing, and if the columns leave a choice.
    """
    if pair is not None and text is None:
        raise UserError("--text-pair-column: requires --text-column")
    if text is not None:
        named = (text,) if pair is None else (text, pair)
        causes = zip(named, ("--text-column", "--text-pair-column"), strict=False)
        split.require(named, {name: f"{option} {name}" for name, option in causes})
        return named
    known = set(split.columns)
    if trained and known.issuperset(trained):
        return tuple(trained)
    count = len(trained)
    common = [names for names in _COMMON if known.issuperset(names)]
    if count:
        common = [names for names in common if len(names) == count]
    # The columns "text" and "text_pair" are a pair, not also a single text.
    largest = [names for names in common if not any({*names} < {*other} for other in common)]
    if len(largest) == 1:
        return largest[0]
    others = [name for name in split.columns if name not in _NOT_TEXT]
    if not largest and len(others) == 1 and not count:
        return (others[0],)
    raise DataError(
        f"{split.source}: cannot tell which column is the text"
        + (f"; the adapter was trained on {' and '.join(map(repr, trained))}" if trained else "")
        + f"; the columns are {', '.join(map(repr, split.columns))}; hint: {_HINT}"
    )


def arity_note(columns: Sequence[str], trained: Sequence[str]) -> str | None:
    """A warning if single texts are given to a model for pairs, or pairs to one for texts."""
    if not trained or len(columns) == len(trained):
        return None
    kinds = {1: "single texts", 2: "pairs of texts"}
    return (
        f"warning: the adapter was trained on {kinds[len(trained)]} ({', '.join(trained)}), but "
        f"the input has {kinds[len(columns)]}"
    )


def _row(text: Given) -> Row:
    if isinstance(text, Mapping):
        return text
    return dict(zip(_PAIR, text, strict=True)) if _kind(text) == "pairs" else {"text": text}


def _kind(text: Given) -> str:
    if isinstance(text, Mapping):
        return "rows"
    return "pairs" if isinstance(text, (tuple, list)) and len(text) == 2 else "texts"


def _joined(value: Any) -> Any:
    words = listed_values(value)
    if not words or not all(isinstance(word, str) for word in words):
        return value
    return " ".join(words)


def _utf8_text(row: Row, column: str) -> str:
    text = required_text(row, column)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"column {column!r}: invalid UTF-8 text at character {error.start + 1}"
        ) from error
    return text
