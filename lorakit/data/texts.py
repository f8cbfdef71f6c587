"""Tokenize texts into rows of token ids and the mask of those that count in the loss."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.chat.ids import Joiner
from lorakit.data.counts import DOCUMENT_PARTS, SPLIT_DOCUMENTS
from lorakit.data.examples import TextExample
from lorakit.errors import ModelError


@dataclass
class TokenRow:
    """One row. ``loss_mask`` marks the tokens that count in the loss, with ``loss_weights`` or,
    without them, a weight of 1. Truncation removed ``lost`` tokens; ``cut`` rows lost the end of
    their last trained segment, EOS included. ``words`` is what ``first_tokens`` returns, for words
    with labels."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    token_type_ids: NDArray[np.int8] | None = None
    lost: int = 0
    cut: bool = False
    loss_weights: NDArray[np.float32] | None = None
    words: NDArray[np.int32] | None = None

    @property
    def truncated(self) -> bool:
        return self.lost > 0


def cut(row: TokenRow, max_length: int, prompt_tokens: int, prefix: int = 0) -> TokenRow:
    """Truncate a row to ``max_length``, first at the beginning of its prompt, then at its end."""
    over = len(row.input_ids) - max_length
    if over <= 0:
        return row
    from_prompt = min(over, prompt_tokens)
    kept = np.r_[:prefix, prefix + from_prompt : len(row.input_ids)][:max_length]
    return TokenRow(
        row.input_ids[kept],
        row.loss_mask[kept],
        lost=over,
        cut=over > from_prompt,
        loss_weights=None if row.loss_weights is None else row.loss_weights[kept],
    )


def encode_prompt(example: TextExample, tokenizer: Any, max_length: int) -> list[int]:
    """``TextEncoder.prompt`` for one prompt."""
    return TextEncoder(Joiner(tokenizer)).prompt(example, max_length)


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer adds before a text (BOS), without those that it adds after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


class TextEncoder:
    """Tokenizes text examples with the tokenizer of ``joiner``.

    Segments are tokenized separately. A text that already begins with BOS or ends with EOS does not
    get a second one.
    """

    def __init__(self, joiner: Joiner) -> None:
        self.tokenizer = joiner.tokenizer
        self._joiner = joiner

    def encode(self, examples: Sequence[TextExample], max_length: int) -> list[TokenRow]:
        """One row per example, truncated to ``max_length``."""
        pieces = iter(self._segment_ids(examples))
        return [
            self._row(example, [next(pieces) for _ in example.segments], max_length)
            for example in examples
        ]

    def parts(
        self, examples: Sequence[TextExample], max_length: int, counted: Counter[str]
    ) -> Iterator[list[TokenRow]]:
        """The rows of each example, of ``max_length`` tokens each but for the last one.

        Each row begins with BOS or, if the tokenizer has none, with the last token of the row
        before, so that every token is predicted once.
        """
        prefix = len(self._prefix)
        size = max_length - max(prefix, 1)
        for row in self.encode(examples, sys.maxsize):
            length = len(row.input_ids)
            if length <= max_length or size < 1:
                yield [cut(row, max_length, 0)]
                continue
            first = max(prefix, 1)
            parts = [
                TokenRow(row.input_ids[kept], row.loss_mask[kept])
                for start in range(first, length, size)
                for kept in [np.r_[:prefix, start - (not prefix) : min(start + size, length)]]
            ]
            counted.update({SPLIT_DOCUMENTS: 1, DOCUMENT_PARTS: len(parts)})
            yield parts

    def prompt(self, example: TextExample, max_length: int) -> list[int]:
        """The ids of a prompt, the same as those before the completion in training."""
        (row,) = self.encode([example], max_length)
        ids: list[int] = row.input_ids.tolist()
        return ids

    @cached_property
    def _prefix(self) -> array[int]:
        return array("i", special_prefix(self.tokenizer))

    def _segment_ids(self, examples: Sequence[TextExample]) -> list[array[int]]:
        """The ids of all segments in order. A segment that follows another does not get the leading
        space that some tokenizers add."""
        joiner = self._joiner
        if not joiner.adds_space:
            return joiner.tokenize([segment.text for e in examples for segment in e.segments])
        segments = [(i, segment.text) for e in examples for i, segment in enumerate(e.segments)]
        found = [joiner.inside(text) if i else joiner.ids([text])[0] for i, text in segments]
        return [array("i", ids) for ids in found]

    def _row(self, example: TextExample, pieces: list[array[int]], max_length: int) -> TokenRow:
        prefix = self._prefix
        has_prefix = bool(prefix and pieces) and pieces[0][: len(prefix)] == prefix
        ids = array("i") if has_prefix else array("i", prefix)
        prompt, mask = 0, bytearray(len(ids))
        for segment, piece in zip(example.segments, pieces, strict=True):
            ids += piece
            mask += bytes([segment.trained]) * len(piece)
            if 1 not in mask:
                prompt = len(ids)
        if example.eos and not self._has_eos(example, ids):
            ids.append(self.tokenizer.eos_token_id)
            mask.append(example.segments[-1].trained)
        if example.train_all:
            mask[len(prefix) :] = b"\1" * (len(mask) - len(prefix))
        row = TokenRow(np.array(ids, np.int32), np.array(mask, np.bool_))
        return cut(row, max_length, max(0, prompt - len(prefix)), len(prefix))

    def _has_eos(self, example: TextExample, ids: array[int]) -> bool:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no EOS token, which ends each "
                "example; hint: set eos_token in its tokenizer_config.json"
            )
        return example.segments[-1].text.rstrip().endswith(self.tokenizer.eos_token) and eos in ids
