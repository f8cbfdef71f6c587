"""Examples -> token ids, and which of them the loss is taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorakit.data.chat import encode_chat
from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.errors import DataError


@dataclass
class Tokens:
    """One row. ``trained`` marks the tokens that the loss is taken on; ``truncated`` rows lost
    tokens, ``cut`` ones the end of what is trained, EOS included."""

    ids: list[int]
    trained: list[bool]
    types: list[int] | None = None
    truncated: bool = False
    cut: bool = False


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    locate: Callable[[int], str],
    to_example: Callable[[Mapping[str, Any]], Example],
    tokenizer: Any,
    max_length: int,
) -> tuple[list[Tokens], list[int | float]]:
    """The tokens of each row, and for an encoder the labels. ``locate`` names a row by its index.

    Raises DataError, with the row, for one that the task refuses or that leaves nothing to train
    on.
    """
    examples = []
    for index, row in enumerate(rows):
        with _at_row(locate, index):
            examples.append(to_example(row))
    encoded = iter(_encode_examples(examples, tokenizer, max_length))
    found = []
    for index, example in enumerate(examples):
        with _at_row(locate, index):
            found.append(next(encoded))
            _check_trained(found[-1], example, max_length)
    return found, [e.label for e in examples if isinstance(e, ClassificationExample)]


@contextmanager
def _at_row(locate: Callable[[int], str], index: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{locate(index)}: {error}") from error


def _check_trained(row: Tokens, example: Example, max_length: int) -> None:
    if not isinstance(example, ClassificationExample) and not any(row.trained[1:]):
        within = f" within task.max_length = {max_length}" if row.truncated else ""
        raise DataError(f"no token to train on{within}")


def _encode_examples(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> Iterable[Tokens]:
    """One row an example, all of one kind.

    A prompt that is too long loses its beginning, so that the completion and its EOS stay; a
    completion that is too long by itself loses its end. Raises DataError, also while the rows are
    taken, for the one whose turn it is.
    """
    first = examples[0]
    if isinstance(first, ClassificationExample):
        return _encode_pairs(examples, tokenizer, max_length)  # type: ignore[arg-type]
    if isinstance(first, ChatExample):
        chats = [e for e in examples if isinstance(e, ChatExample)]
        return (_cut(Tokens(*encode_chat(e, tokenizer)), max_length, 0) for e in chats)
    return _encode_texts(examples, tokenizer, max_length)  # type: ignore[arg-type]


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


def _encode_texts(examples: Sequence[TextExample], tokenizer: Any, max_length: int) -> list[Tokens]:
    prefix = special_prefix(tokenizer)
    texts = [segment.text for example in examples for segment in example.segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    encoded = []
    for example in examples:
        row = Tokens(list(prefix), [False] * len(prefix))
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


def _cut(row: Tokens, max_length: int, prompt_tokens: int, prefix: int = 0) -> Tokens:
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
) -> list[Tokens]:
    paired = examples[0].text_pair is not None
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:  # the tokenizer would then cut nothing
        raise DataError(
            f"task.max_length = {max_length}: the tokenizer adds {special} special tokens to each "
            f"row; allowed: {special + 1} or more"
        )
    rows = _pair_tokens(examples, tokenizer, paired, truncation=False)
    long = [index for index, row in enumerate(rows) if len(row.ids) > max_length]
    if long:
        chosen = [examples[index] for index in long]
        cut = _pair_tokens(chosen, tokenizer, paired, truncation=True, max_length=max_length)
        for index, row in zip(long, cut, strict=True):
            row.truncated = True
            rows[index] = row
    return rows


def _pair_tokens(
    examples: Sequence[ClassificationExample], tokenizer: Any, paired: bool, **truncation: Any
) -> list[Tokens]:
    first = [example.text for example in examples]
    second = [example.text_pair for example in examples] if paired else None
    found = tokenizer(first, second, verbose=False, **truncation)
    types: Iterable[Any] = found.get("token_type_ids") or [None] * len(examples)
    return [
        Tokens(ids, [False] * len(ids), kinds)
        for ids, kinds in zip(found.input_ids, types, strict=True)
    ]
