"""Encode every row of a split as token ids with a loss mask, at three to five bytes per token.

The tokens of splits with many rows are memory-mapped from a file.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.cache import (
    CACHED_ROWS,
    Arrays,
    EncodedCache,
    Shard,
    read_arrays,
    write_arrays,
)
from lorakit.data.counts import Counts
from lorakit.data.examples import Example
from lorakit.data.rows import Row, disk_errors, scratch_file
from lorakit.data.shards import MANY_ROWS, Job, encode_shards
from lorakit.data.sources import SourceRows, Split
from lorakit.data.words import label_weight
from lorakit.errors import DataError

_ROWS_AT_ONCE = 10_000
TokenIds = NDArray[np.int32] | NDArray[np.uint16]
#: A class index, a float for a regression, for several labels per row a 0 or 1 for each class, or
#: the class index of each word.
Label = int | float | NDArray[np.int64]


@dataclass(frozen=True)
class EncodedRow:
    """``loss_mask`` marks the tokens that count in the loss, with ``loss_weights`` or, without
    them, a weight of 1; ``label`` is set for encoders only, ``words`` (see ``first_tokens``) for
    labels of words."""

    input_ids: TokenIds
    loss_mask: NDArray[np.bool_]
    token_type_ids: NDArray[np.int8] | None = None
    label: Label | None = None
    loss_weights: NDArray[np.float32] | None = None
    words: NDArray[np.int32] | None = None
    class_weights: NDArray[np.float64] | None = None

    @property
    def trained_count(self) -> int:
        """The number of losses: trained tokens; for an encoder 1, or its words with a token."""
        if self.words is not None:
            return int(self.loss_mask.sum())
        return 1 if self.label is not None else int(self.loss_mask[1:].sum())

    @property
    def loss_count(self) -> float:
        """The sum of the weights of the losses, by default their number."""
        if self.class_weights is not None:
            return label_weight(self.label, self.words, self.class_weights)
        if self.loss_weights is None:
            return self.trained_count
        return float(self.loss_weights[1:].sum(dtype=np.float64))


@dataclass(frozen=True)
class EncodedSplit:
    """All rows of a split, concatenated: row i is tokens ``offsets[i]`` to ``offsets[i + 1]``. A
    chat or a document may become several rows; ``counts.rows`` counts the rows of the source.
    ``labels`` has one label per row for an encoder, ``words`` a word index or -1 per token for
    labels of words. ``loss_weights`` is None if all losses weigh 1; ``class_weights`` are those of
    an encoder with one label per row or word. ``sources`` are those of a mixture, with their
    numbers of rows of tokens."""

    input_ids: TokenIds
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    token_type_ids: NDArray[np.int8] | None
    labels: tuple[Label, ...] | None
    counts: Counts
    loss_weights: NDArray[np.float32] | None = None
    words: NDArray[np.int32] | None = None
    class_weights: NDArray[np.float64] | None = None
    sources: tuple[SourceRows, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> EncodedRow:
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        types = None if self.token_type_ids is None else self.token_type_ids[part]
        label = None if self.labels is None else self.labels[index]
        weights = None if self.loss_weights is None else self.loss_weights[part]
        words = None if self.words is None else self.words[part]
        return EncodedRow(
            *(self.input_ids[part], self.loss_mask[part], types, label),
            *(weights, words, self.class_weights),
        )

    def class_ids(self) -> Iterator[int | float]:
        """The class indices of all rows of an encoder, or of their words, in order."""
        for label in self.labels or ():
            if isinstance(label, np.ndarray) and self.words is not None:
                yield from label.tolist()
            elif isinstance(label, np.ndarray):
                yield from np.flatnonzero(label).tolist()
            else:
                yield label

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """The number of losses of each row: for an encoder 1, or its words with a token; otherwise
        its trained tokens. The first token is never predicted."""
        counts: NDArray[np.int64]
        if self.words is not None:
            counts = np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)
        elif self.labels is not None:
            counts = np.ones(len(self), np.int64)
        else:
            counts = self._summed(self.loss_mask, np.int64)
        return counts

    @cached_property
    def loss_counts(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """The sum of the weights of each row's losses, by default their number."""
        if self.class_weights is not None:
            rows = range(len(self))
            weights: NDArray[np.float64] = np.array([self[row].loss_count for row in rows])
            return weights
        if self.loss_weights is None:
            return self.trained_counts
        sums: NDArray[np.float64] = self._summed(self.loss_weights, np.float64)
        return sums

    def _summed(self, values: NDArray[Any], dtype: type) -> NDArray[Any]:
        """Add the values of each row's tokens but the first."""
        sums: NDArray[Any] = np.empty(len(self), dtype)
        for start in range(0, len(self), _ROWS_AT_ONCE):  # bounds the copy
            edges = self.offsets[start : start + _ROWS_AT_ONCE + 1]
            tokens: NDArray[Any] = values[edges[0] : edges[-1]].astype(dtype)
            starts = edges[:-1] - edges[0]
            tokens[starts] = 0
            sums[start : start + len(starts)] = np.add.reduceat(tokens, starts)
        return sums

    def rows_without_eos(self, stops: Set[int], cut_to: int | None = None) -> int:
        """Count the rows whose last trained segment contains none of the ids ``stops``, which end a
        generation. Rows that were truncated within it, to ``cut_to`` tokens, are not counted."""
        lasts = self.offsets[1:] - 1
        stopping = np.isin(self.input_ids[lasts], list(stops)) & self.loss_mask[lasts]
        cut = np.zeros_like(stopping)
        if cut_to:
            cut = self.loss_mask[lasts] & (self.lengths == cut_to)
        open_ended = np.flatnonzero(~(stopping | cut))
        return sum(stops.isdisjoint(_last_trained(self[int(i)])) for i in open_ended)

    @property
    def trained_tokens(self) -> int:
        return int(self.trained_counts.sum())


def encode_split(
    split: Split,
    to_example: Callable[[Row], Example],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int], None] = lambda rows: None,
    cache: EncodedCache | None = None,
    skip_bad: bool = False,
) -> EncodedSplit:
    """Tokenize a split, or read its tokens from the cache.

    A prompt that is too long loses its beginning, so that the completion and its EOS are kept; a
    completion that is too long by itself loses its end and is counted. Raises DataError with file
    and row for a row that the task rejects or that has no token to train on, and for a
    ``max_length`` that leaves no room beside an encoder's special tokens. ``skip_bad`` skips and
    counts such rows unless all rows are bad.
    """
    if cache is None or len(split) < CACHED_ROWS:
        cache = None
    elif found := cache.read(split):
        return _from_arrays(split, *found)
    began = time.monotonic()
    shards = encode_shards(Job(split, to_example, tokenizer, max_length, skip_bad), on_progress)
    _check_not_all_bad(split, shards)
    if cache is not None:
        spent = time.monotonic() - began
        cache.say(f"{split.name}: {len(split):,} rows tokenized in {spent:.1f} s")
    return _from_arrays(split, *_read_back(split, shards, cache))


def _check_not_all_bad(split: Split, shards: Sequence[Shard]) -> None:
    if sum(shard.counts.skipped_rows for shard in shards) == len(split):
        index, reason = next(first for shard in shards for first in shard.counts.skipped)
        raise DataError(
            f"{split.source}: all {len(split):,} rows are bad: task.on_bad_row: skip leaves "
            f"nothing to train on; the first is {split.locate(index)}: {reason}"
        )


def check_token_ids(encoded: EncodedSplit, tokenizer: Any, embedding_rows: int) -> None:
    """Raise DataError unless the ids of all tokens and of the padding are below
    ``embedding_rows``."""
    check_largest_id(int(encoded.input_ids.max()), tokenizer, embedding_rows)


def check_largest_id(largest: int, tokenizer: Any, embedding_rows: int) -> None:
    """Like ``check_token_ids``, given the largest id."""
    largest = max(largest, tokenizer.pad_token_id or 0)
    if largest >= embedding_rows:
        raise DataError(
            f"the tokenizer does not match the model: it produces id {largest}, but the model has "
            f"{embedding_rows} embeddings (ids 0 to {embedding_rows - 1})"
        )


def _read_back(
    split: Split, shards: Sequence[Shard], cache: EncodedCache | None
) -> tuple[Arrays, Counts]:
    """Concatenate the shards in a cache entry, or else in a scratch file, and read it back."""
    file = None if cache is None else cache.store(split, shards)
    if file is None:
        file = io.BytesIO() if len(split) < MANY_ROWS else scratch_file()
        with disk_errors("the tokens"):
            write_arrays(shards, file)
    return read_arrays(file)


def _from_arrays(split: Split, arrays: Arrays, counts: Counts) -> EncodedSplit:
    lengths = arrays["lengths"]
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return EncodedSplit(
        input_ids=arrays["input_ids"],
        loss_mask=arrays["loss_mask"],
        offsets=offsets,
        token_type_ids=arrays.get("token_type_ids"),
        labels=_labels(arrays),
        words=arrays.get("words"),
        counts=counts,
        loss_weights=arrays.get("loss_weights"),
        sources=_token_sources(split, arrays["origins"]),
    )


def _token_sources(split: Split, origins: NDArray[np.int64]) -> tuple[SourceRows, ...]:
    """The sources of ``split`` with their numbers of rows of tokens."""
    if not split.sources:
        return ()
    ends = np.cumsum([source.rows for source in split.sources])
    counts = np.diff(np.searchsorted(origins, ends), prepend=0).tolist()
    for source, count in zip(split.sources, counts, strict=True):
        if not count:
            raise DataError(
                f"task.path: {source.label}: all {source.rows:,} rows are bad: "
                "task.on_bad_row: skip leaves nothing to train on in this source"
            )
    return tuple(
        replace(source, rows=count) for source, count in zip(split.sources, counts, strict=True)
    )


def _labels(arrays: Arrays) -> tuple[Label, ...] | None:
    labels, sizes = arrays.get("labels"), arrays.get("label_sizes")
    if labels is None:
        return None
    if sizes is None:
        return tuple(labels.tolist())
    return tuple(np.split(labels, np.cumsum(sizes[:-1])))


def _last_trained(row: EncodedRow) -> list[int]:
    """The ids of the row's last trained segment."""
    trained = np.flatnonzero(row.loss_mask)
    if not len(trained):
        return []
    gaps = np.flatnonzero(np.diff(trained) > 1)
    first = trained[gaps[-1] + 1] if len(gaps) else trained[0]
    return [int(token) for token in row.input_ids[first : trained[-1] + 1]]
