"""Tokenize examples into token ids and the mask of those that count in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lorakit.data.chat import ChatEncoder
from lorakit.data.chat.ids import IdRow, Joiner
from lorakit.data.counts import Counts, OnBadRow
from lorakit.data.examples import (
    ChatExample,
    ClassificationExample,
    Example,
    TextExample,
    WordsExample,
)
from lorakit.data.rows import Row, RowSequence, UnreadRow
from lorakit.data.texts import TextEncoder, TokenRow, cut
from lorakit.data.words import first_tokens
from lorakit.errors import DataError


@dataclass
class EncodedRows:
    """``rows`` in order, one per source row or, for a chat or a document, several; ``origins`` are
    the indices of the source rows. ``labels`` has the label of each row for an encoder."""

    rows: list[TokenRow]
    origins: list[int]
    labels: list[int | float | tuple[int, ...]]
    counts: Counts


class RowEncoder:
    """Tokenizes rows with one tokenizer.

    A prompt that is too long loses its beginning, so that the completion and its EOS are kept; a
    completion that is too long by itself loses its end.
    """

    def __init__(
        self, to_example: Callable[[Row], Example], tokenizer: Any, max_length: int
    ) -> None:
        self._to_example = to_example
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._joiner = Joiner(tokenizer)

    def encode(
        self, rows: RowSequence, locate: Callable[[int], str], skip: OnBadRow | None = None
    ) -> EncodedRows:
        """Tokenize rows. ``locate`` returns the file and row of an index.

        Raises DataError, with file and row, for a row that cannot be read, that the task rejects or
        that has no token to train on. With ``skip``, such rows are skipped, and it is called with
        the index and the reason.
        """
        given: list[tuple[int, Example]] = []
        for index, row in enumerate(rows):
            with _at_row(locate, index, skip):
                if isinstance(row, UnreadRow):
                    raise DataError(row.reason)
                given.append((index, self._to_example(row)))
        counted: Counter[str] = Counter()
        encoded = iter(self._examples([example for _, example in given], counted))
        found: list[TokenRow] = []
        origins: list[int] = []
        labels: list[int | float | tuple[int, ...]] = []
        for index, example in given:
            with _at_row(locate, index, skip):
                found += _trainable(next(encoded), example, self._max_length)
                origins += [index] * (len(found) - len(origins))
                if isinstance(example, ClassificationExample):
                    labels.append(example.label)
        counts = Counts(
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in found),
            truncated_rows=sum(row.truncated for row in found),
            lost_tokens=sum(row.lost for row in found),
            cut_completions=sum(row.cut for row in found),
            notes=counted,
        )
        return EncodedRows(found, origins, labels, counts)

    def _examples(
        self, examples: Sequence[Example], counted: Counter[str]
    ) -> Iterable[list[TokenRow]]:
        """Return the rows of each example; all examples are of one kind. ``counted`` is updated
        with the ``notes`` of ``Counts``.

        Raises DataError for an example, either immediately or when its rows are taken from the
        iterator.
        """
        if not examples:
            return []
        first = examples[0]
        if isinstance(first, ClassificationExample):
            pairs = _encode_pairs(examples, self._tokenizer, self._max_length)  # type: ignore[arg-type]
            return ([row] for row in pairs)
        if isinstance(first, ChatExample):
            chats = [e for e in examples if isinstance(e, ChatExample)]
            return _encode_chats(chats, self._joiner, self._max_length, counted)
        texts = [e for e in examples if isinstance(e, TextExample)]
        if first.splits:
            return self._texts.parts(texts, self._max_length, counted)
        return ([row] for row in self._texts.encode(texts, self._max_length))

    @cached_property
    def _texts(self) -> TextEncoder:
        return TextEncoder(self._joiner)


@contextmanager
def _at_row(locate: Callable[[int], str], index: int, skip: OnBadRow | None) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if skip is None:
            raise DataError(f"{locate(index)}: {error}") from error
        skip(index, str(error))


def _trainable(rows: list[TokenRow], example: Example, max_length: int) -> list[TokenRow]:
    """The rows of an example that have a trained token. Raises DataError if there are none."""
    if isinstance(example, ClassificationExample) and not isinstance(example, WordsExample):
        return rows
    if isinstance(example, WordsExample) and rows[0].loss_mask.any():
        return rows
    trained = [row for row in rows if row.loss_mask[1:].any()]
    if not trained:
        within = f" within task.max_length = {max_length}" if rows[0].truncated else ""
        raise DataError(f"nothing to train on{within}")
    return trained


def _encode_chats(
    chats: Sequence[ChatExample], joiner: Joiner, max_length: int, counted: Counter[str]
) -> Iterator[list[TokenRow]]:
    """A row with one trained turn loses the beginning of its prompt, as prompts do in generation; a
    row with several loses its end. After an error, the iterator continues with the next chat."""
    encoder = ChatEncoder(joiner)

    def encode(chat: ChatExample) -> list[TokenRow]:
        encoded = encoder.encode(chat)
        counted.update(encoded.counts)
        return [
            cut(_chat_row(row), max_length, row.prompt * (len(row.turns) == 1))
            for row in encoded.rows
        ]

    return map(encode, chats)


def _chat_row(row: IdRow) -> TokenRow:
    weights = np.array(row.loss_weights, np.float32)
    mask = weights > 0
    found = TokenRow(np.array(row.input_ids, np.int32), mask)
    if (weights[mask] != 1).any():
        found.loss_weights = weights
    return found


def _encode_pairs(
    examples: Sequence[ClassificationExample], tokenizer: Any, max_length: int
) -> list[TokenRow]:
    paired = examples[0].text_pair is not None
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:  # the tokenizer would then not truncate at all
        raise DataError(
            f"task.max_length = {max_length}: the tokenizer adds {special} special tokens to each "
            f"row; allowed: {special + 1} or more"
        )
    rows = _pair_tokens(examples, tokenizer, paired, truncation=False)
    long = [index for index, row in enumerate(rows) if len(row.input_ids) > max_length]
    if long:
        chosen = [examples[index] for index in long]
        cut = _pair_tokens(chosen, tokenizer, paired, truncation=True, max_length=max_length)
        for index, row in zip(long, cut, strict=True):
            row.lost = len(rows[index].input_ids) - len(row.input_ids)
            rows[index] = row
    return rows


def _pair_tokens(
    examples: Sequence[ClassificationExample], tokenizer: Any, paired: bool, **truncation: Any
) -> list[TokenRow]:
    first = [example.text for example in examples]
    second = [example.text_pair for example in examples] if paired else None
    if isinstance(examples[0], WordsExample):
        truncation["return_offsets_mapping"] = True
    found = tokenizer(first, second, verbose=False, **truncation)
    types: Iterable[Any] = found.get("token_type_ids") or [None] * len(examples)
    rows = [
        TokenRow(
            np.array(ids, np.int32),
            np.zeros(len(ids), np.bool_),
            None if kinds is None else np.array(kinds, np.int8),
        )
        for ids, kinds in zip(found.input_ids, types, strict=True)
    ]
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if isinstance(example, WordsExample):
            row.words = first_tokens(example.words, found.offset_mapping[index])
            row.loss_mask = row.words >= 0
    return rows
