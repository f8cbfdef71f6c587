"""Examples -> token ids and what is trained of them, held flat: five bytes a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.chat import encode_chat
from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.data.sources import Split
from lorakit.errors import DataError

_BATCH_ROWS = 1000


@dataclass(frozen=True)
class EncodedRow:
    """``trained`` marks the tokens that the loss is taken on; ``label`` is an encoder's."""

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    token_type_ids: NDArray[np.int8] | None = None
    label: int | float | None = None


@dataclass(frozen=True)
class EncodedSplit:
    """All rows, flat; row i is tokens ``offsets[i]`` to ``offsets[i + 1]``."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    token_type_ids: NDArray[np.int8] | None
    labels: tuple[int | float, ...] | None
    truncated_rows: int
    cut_completions: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> EncodedRow:
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        types = None if self.token_type_ids is None else self.token_type_ids[part]
        label = None if self.labels is None else self.labels[index]
        return EncodedRow(self.tokens[part], self.trained[part], types, label)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss is taken on: a row's first token has none before it."""
        return int(self.trained.sum()) - int(self.trained[self.offsets[:-1]].sum())


@dataclass
class _Encoded:
    """One row on its way into the arrays."""

    ids: list[int]
    trained: list[bool]
    types: list[int] | None = None
    truncated: bool = False
    cut: bool = False


def encode_split(
    split: Split,
    to_example: Callable[[Mapping[str, Any]], Example],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> EncodedSplit:
    """Tokenise a split.

    A prompt that is too long loses its beginning, so that the completion and its EOS stay; a
    completion that is too long by itself loses its end, and is counted. Raises DataError with file
    and row for a row that the task refuses or that leaves nothing to train on, and for a
    ``max_length`` that has no room beside an encoder's special tokens.
    """
    rows: list[_Encoded] = []
    labels: list[int | float] = []
    for start in range(0, len(split), _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, len(split))
        examples = []
        for index in range(start, stop):
            with _at_row(split, index):
                examples.append(to_example(split.rows[index]))
        encoded = iter(_encode(examples, tokenizer, max_length))
        for index, example in enumerate(examples, start):
            with _at_row(split, index):
                row = next(encoded)
            if isinstance(example, ClassificationExample):
                labels.append(example.label)
            elif not any(row.trained[1:]):
                raise DataError(
                    f"{split.locate(index)}: no token to train on"
                    + (f" within task.max_length = {max_length}" if row.truncated else "")
                )
            rows.append(row)
        on_progress(stop)
    return _flatten(rows, labels or None)


def check_token_ids(encoded: EncodedSplit, tokenizer: Any, embedding_rows: int) -> None:
    """Raise DataError if a token or the padding has an id for which the model, of
    ``embedding_rows`` embeddings, has none."""
    largest = max(int(encoded.tokens.max()), tokenizer.pad_token_id or 0)
    if largest >= embedding_rows:
        raise DataError(
            f"the tokenizer does not belong to the model: the tokenizer gives id {largest}, and "
            f"the model has {embedding_rows} embeddings (ids 0 to {embedding_rows - 1})"
        )


def encode_prompt(example: TextExample, tokenizer: Any, max_length: int) -> list[int]:
    """The ids of a prompt, as they stand before the completion in training."""
    return _encode_texts([example], tokenizer, max_length)[0].ids


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by itself (BOS), without those behind it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


@contextmanager
def _at_row(split: Split, index: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{split.locate(index)}: {error}") from error


def _encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Iterable[_Encoded]:
    first = examples[0]
    if isinstance(first, ClassificationExample):
        return _encode_pairs(examples, tokenizer, max_length)  # type: ignore[arg-type]
    if isinstance(first, ChatExample):
        chats = [e for e in examples if isinstance(e, ChatExample)]
        return (_cut(_Encoded(*encode_chat(e, tokenizer)), max_length, 0) for e in chats)
    return _encode_texts(examples, tokenizer, max_length)  # type: ignore[arg-type]


def _encode_texts(
    examples: Sequence[TextExample], tokenizer: Any, max_length: int
) -> list[_Encoded]:
    prefix = special_prefix(tokenizer)
    texts = [segment.text for example in examples for segment in example.segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    encoded = []
    for example in examples:
        row = _Encoded(list(prefix), [False] * len(prefix))
        prompt_tokens = 0
        for segment in example.segments:
            piece = next(pieces)
            row.ids += piece
            row.trained += [segment.trained] * len(piece)
            if not any(row.trained):
                prompt_tokens = len(row.ids) - len(prefix)
        if example.eos:
            if tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no EOS token to end an example with")
            row.ids.append(tokenizer.eos_token_id)
            row.trained.append(example.segments[-1].trained)
        encoded.append(_cut(row, max_length, prompt_tokens, len(prefix)))
    return encoded


def _cut(row: _Encoded, max_length: int, prompt_tokens: int, prefix: int = 0) -> _Encoded:
    """Fit a row into ``max_length``: from the prompt's beginning first, then from the end."""
    over = len(row.ids) - max_length
    if over <= 0:
        return row
    from_prompt = min(over, prompt_tokens)
    for values in (row.ids, row.trained):
        del values[prefix : prefix + from_prompt]
        del values[max_length:]
    row.truncated, row.cut = True, over > from_prompt
    return row


def _encode_pairs(
    examples: Sequence[ClassificationExample], tokenizer: Any, max_length: int
) -> list[_Encoded]:
    first = [example.text for example in examples]
    second = [example.text_pair for example in examples]
    pairs = None if second[0] is None else second
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length <= special:  # the tokenizer would then cut nothing
        raise DataError(
            f"task.max_length = {max_length}: the tokenizer adds {special} special tokens to each "
            f"row; allowed: {special + 1} or more"
        )
    full = tokenizer(first, pairs, truncation=False, verbose=False)
    cut = tokenizer(first, pairs, truncation=True, max_length=max_length, verbose=False)
    types: Iterable[Any] = cut.get("token_type_ids") or [None] * len(examples)
    return [
        _Encoded(ids, [False] * len(ids), kinds, truncated=len(whole) > len(ids))
        for ids, kinds, whole in zip(cut.input_ids, types, full.input_ids, strict=True)
    ]


def _flatten(rows: list[_Encoded], labels: list[int | float] | None) -> EncodedSplit:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
    typed = rows[0].types is not None
    return EncodedSplit(
        tokens=np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows]),
        trained=np.concatenate([np.asarray(row.trained, dtype=np.bool_) for row in rows]),
        offsets=offsets,
        token_type_ids=(
            np.concatenate([np.asarray(row.types, dtype=np.int8) for row in rows])
            if typed
            else None
        ),
        labels=None if labels is None else tuple(labels),
        truncated_rows=sum(row.truncated for row in rows),
        cut_completions=sum(row.cut for row in rows),
    )
