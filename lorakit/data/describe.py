"""Encoded rows in words: their text in trained and masked pieces, and a split's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lorakit.data.encode import EncodedRow, EncodedSplit, encode_split
from lorakit.data.examples import Example
from lorakit.data.packing import Packing
from lorakit.data.sources import Split

ToExample = Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind as text; ``special`` are the tokenizer's special tokens."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class DescribedRow:
    """``where`` is the file and row, ``tokens`` the ids' names in the vocabulary.

    ``trained`` marks the tokens that the loss is taken on, so never the first: nothing stands
    before it. ``truncated`` rows lost tokens, ``cut`` ones the end of what is trained, EOS
    included. ``label`` is an encoder's.
    """

    where: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    trained: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    truncated: bool
    cut: bool
    label: int | float | None


@dataclass(frozen=True)
class Summary:
    """A split in figures. ``endless_rows`` are those whose last trained token does not stop a
    generation; it and ``trained_tokens`` are None for an encoder, whose loss is on the label.
    ``bins`` hold packed rows, ``bin_fill`` is how full they are; None where nothing is packed."""

    rows: int
    tokens: int
    min_length: int
    mean_length: float
    max_length: int
    truncated_rows: int
    trained_tokens: int | None
    cut_completions: int | None
    endless_rows: int | None
    bins: int | None
    bin_fill: float | None

    @property
    def trained_share(self) -> float | None:
        return None if self.trained_tokens is None else self.trained_tokens / self.tokens


def describe_row(
    split: Split, index: int, to_example: ToExample, tokenizer: Any, max_length: int
) -> DescribedRow:
    """The row at ``index`` as ``encode_split`` makes it. Raises its DataError."""
    where = split.locate(index)
    alone = Split(split.name, [split.rows[index]], where, f"{split.fingerprint}@{index}")
    encoded = encode_split(alone, to_example, tokenizer, max_length)
    row = encoded[0]
    ids = row.input_ids.tolist()
    trained = [False, *row.trained[1:].tolist()]
    return DescribedRow(
        where=where,
        ids=tuple(ids),
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        trained=tuple(trained),
        pieces=tuple(_pieces(ids, trained, tokenizer)),
        truncated=encoded.truncated_rows > 0,
        cut=encoded.cut_completions > 0,
        label=row.label,
    )


def summarise(encoded: EncodedSplit, stops: Set[int], packed_to: int | None = None) -> Summary:
    """The figures of all rows; ``stops`` are the ids at which a generation ends, ``packed_to`` the
    tokens of a bin if rows are packed."""
    lengths = encoded.lengths
    packing = Packing(lengths, packed_to, seed=0) if packed_to else None
    causal = encoded.labels is None
    return Summary(
        rows=len(encoded),
        tokens=int(lengths.sum()),
        min_length=int(lengths.min()),
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        truncated_rows=encoded.truncated_rows,
        trained_tokens=encoded.trained_tokens if causal else None,
        cut_completions=encoded.cut_completions if causal else None,
        endless_rows=_endless(encoded, stops) if causal else None,
        bins=len(packing) if packing else None,
        bin_fill=packing.fill if packing else None,
    )


def _endless(encoded: EncodedSplit, stops: Set[int]) -> int:
    rows = (encoded[index] for index in range(len(encoded)))
    return sum(_last_trained(row) not in stops for row in rows)


def _last_trained(row: EncodedRow) -> int:
    return int(row.input_ids[np.flatnonzero(row.trained)[-1]])


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    """The text in order. A token alone may be half a character, or lack its space: a piece ends
    where all tokens up to its last agree with the whole text, so a character is never split."""
    special = _special_ids(tokenizer)
    text = _decode(ids, tokenizer)
    begin = end = tokens = 0
    kinds = [(flag, token in special) for token, flag in zip(ids, trained, strict=True)]
    for (is_trained, is_special), group in groupby(kinds):
        tokens += len(list(group))
        begin, end = end, max(end, _agreeing(_decode(ids[:tokens], tokenizer), text))
        if begin < end:
            yield Piece(text[begin:end], is_trained, is_special)
    assert end == len(text)


def _agreeing(text: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
