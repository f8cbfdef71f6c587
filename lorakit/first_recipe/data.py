"""The rows that a first recipe trains on: where they are, how many, and how long in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.data.paths import find_files, no_split
from lorakit.data.rows import UnreadRow
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError, counted
from lorakit.first_recipe.columns import Column, describe_columns, sampled
from lorakit.first_recipe.settings import Lengths
from lorakit.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Training files of more bytes are not read to the end.
_WHOLE_BYTES = 64 << 20
_FIRST_ROWS = 5000
#: Rows that are tokenized.
_MEASURED_ROWS = 500
#: More than any row has: nothing is cut while lengths are measured.
_NO_LIMIT = 2**24


@dataclass(frozen=True)
class Data:
    """``path`` is the recipe's ``task.path``. ``train`` has the first rows only unless
    ``is_whole``. ``validation_rows`` is at most ``_FIRST_ROWS``."""

    path: Any
    train: Split
    is_whole: bool
    validation_rows: int
    columns: dict[str, Column]

    @property
    def rows(self) -> int | None:
        """The number of training rows; None if not all were read."""
        return len(self.train) if self.is_whole else None

    def described(self) -> str:
        rows = counted(len(self.train), "row")
        return f"{self.train.source}: {rows if self.is_whole else f'the first {rows}'}"


def read_data(data: str, validation: str | None) -> Data:
    """Read the training rows in a file, a glob or a directory. Raises DataError as training
    does."""
    try:
        return _read(data if validation is None else {"train": data, "validation": validation})
    except DataError as error:  # about a key of a recipe that does not exist yet
        raise DataError(error.problem, allowed=error.allowed, hint=error.hint) from error


def _read(path: Any) -> Data:
    files = find_files(path, "train").files
    if not files:
        raise no_split(path, "train")
    is_whole = sum(file.stat().st_size for file in files) <= _WHOLE_BYTES
    train = load_split(path, "train", limit=None if is_whole else _FIRST_ROWS)
    assert train is not None, "the split has files"
    return Data(path, train, is_whole, _validation_rows(path), describe_columns(train))


def _validation_rows(path: Any) -> int:
    for split in ("validation", "validation_matched"):
        if find_files(path, split).files:
            found = load_split(path, split, limit=_FIRST_ROWS)
            return 0 if found is None else len(found)
    return 0


def measure(
    task: Task, config: Any, split: Split, tokenizer: PreTrainedTokenizerBase | None
) -> Lengths:
    """The lengths in tokens of a sample of the rows as the task reads them; without a tokenizer, an
    estimate from their size. Raises DataError, with file and row, for a row that cannot be trained
    on, unless such rows are skipped."""
    indices = sampled(split, _MEASURED_ROWS)
    skip = (lambda index, reason: None) if config.on_bad_row == "skip" else None
    rows = [split.rows[index] for index in indices]
    if tokenizer is None:
        lengths = [
            _estimate(task.example(row, config)) for row in rows if not isinstance(row, UnreadRow)
        ]
    else:
        from lorakit.data.tokens import RowEncoder

        encoder = RowEncoder(lambda row: task.example(row, config), tokenizer, _NO_LIMIT)
        encoded = encoder.encode(rows, lambda index: split.locate(indices[index]), skip)
        lengths = [len(row.input_ids) for row in encoded.rows]
    if not lengths:
        raise DataError(f"{split.source}: no row can be trained on")
    return Lengths(sorted(lengths), is_estimate=tokenizer is None)


def _estimate(example: Example) -> int:
    """A token for each 3 bytes: somewhat more than tokenizers make of English, and about what they
    make of Chinese."""
    return max(1, sum(len(text.encode()) for text in _texts(example)) // 3)


def _texts(example: Example) -> Iterator[str]:
    if isinstance(example, ClassificationExample):
        yield example.text
        yield example.text_pair or ""
    elif isinstance(example, TextExample):
        yield from (segment.text for segment in example.segments)
    elif isinstance(example, ChatExample):
        for message in example.messages:  # the template adds a few tokens
            yield f"<|{message['role']}|>{message.get('content') or ''}"
