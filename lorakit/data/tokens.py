"""What is counted of the rows of a split while they are tokenised.

Examples -> token ids, and which of them the loss is taken on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.chat import ChatEncoder
from lorakit.data.chat.ids import Joiner
from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.data.rows import UnreadRow
from lorakit.errors import DataError

#: So many bad rows are named, and all are counted.
NAMED_ROWS = 5


@dataclass
class Counts:
    """``rows`` are the source's, of which a chat may give several rows of tokens;
    ``truncated_rows`` and ``cut_completions`` are rows of tokens. ``skipped_rows`` of ``rows`` are
    left out as bad, the first of them in ``skipped`` by index and reason. ``notes`` are the counts
    of ``lorakit.data.chat.encode``, by name."""

    rows: int = 0
    truncated_rows: int = 0
    cut_completions: int = 0
    skipped_rows: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.truncated_rows += other.truncated_rows
        self.cut_completions += other.cut_completions
        self.skipped_rows += other.skipped_rows
        self.skipped = (self.skipped + other.skipped)[:NAMED_ROWS]
        self.notes.update(other.notes)

    def skip(self, index: int, reason: str) -> None:
        """Count a bad row of the source."""
        self.skipped_rows += 1
        if len(self.skipped) < NAMED_ROWS:
            self.skipped.append((index, reason))


#: Gets the index of a row that is left out, and the reason.
OnBadRow = Callable[[int, str], None]


@dataclass
class TokenRow:
    """One row. ``loss_mask`` marks the tokens that count in the loss. ``truncated`` rows lost
    tokens; ``cut`` rows lost the end of their last trained segment, EOS included."""

    input_ids: list[int]
    loss_mask: list[bool]
    token_type_ids: list[int] | None = None
    truncated: bool = False
    cut: bool = False


@dataclass
class EncodedRows:
    """``rows`` in order, one a source row or, of a chat, several. ``labels`` are an encoder's, one
    a row."""

    rows: list[TokenRow]
    labels: list[int | float]
    counts: Counts


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    locate: Callable[[int], str],
    to_example: Callable[[Mapping[str, Any]], Example],
    tokenizer: Any,
    max_length: int,
    skip: OnBadRow | None = None,
) -> EncodedRows:
    """The tokens of each row. ``locate`` names a row by its index.

    Raises DataError, with the row, for one that cannot be read, that the task refuses or that
    leaves nothing to train on; with ``skip``, which gets its index and the reason, such a row is
    left out.
    """
    given: list[tuple[int, Example]] = []
    for index, row in enumerate(rows):
        with _at_row(locate, index, skip):
            if isinstance(row, UnreadRow):
                raise DataError(row.reason)
            given.append((index, to_example(row)))
    examples = [example for _, example in given]
    counted: Counter[str] = Counter()
    encoded = iter(_encode_examples(examples, tokenizer, max_length, counted))
    found: list[TokenRow] = []
    labels: list[int | float] = []
    for index, example in given:
        with _at_row(locate, index, skip):
            found += _trainable(next(encoded), example, max_length)
            if isinstance(example, ClassificationExample):
                labels.append(example.label)
    counts = Counts(
        rows=len(rows),
        truncated_rows=sum(row.truncated for row in found),
        cut_completions=sum(row.cut for row in found),
        notes=counted,
    )
    return EncodedRows(found, labels, counts)


@contextmanager
def _at_row(locate: Callable[[int], str], index: int, skip: OnBadRow | None) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if skip is None:
            raise DataError(f"{locate(index)}: {error}") from error
        skip(index, str(error))


def _trainable(rows: list[TokenRow], example: Example, max_length: int) -> list[TokenRow]:
    """Those of an example's rows on which the loss is taken. Raises DataError for none."""
    if isinstance(example, ClassificationExample):
        return rows
    trained = [row for row in rows if any(row.loss_mask[1:])]
    if not trained:
        within = f" within task.max_length = {max_length}" if rows[0].truncated else ""
        raise DataError(f"no token to train on{within}")
    return trained


def _encode_examples(
    examples: Sequence[Example], tokenizer: Any, max_length: int, counted: Counter[str]
) -> Iterable[list[TokenRow]]:
    """The rows of each example, all examples of one kind; ``counted`` gets what is to be said.

    A prompt that is too long loses its beginning, so that the completion and its EOS stay; a
    completion that is too long by itself loses its end. Raises DataError, also while the rows are
    taken, for the one whose turn it is.
    """
    if not examples:
        return []
    first = examples[0]
    if isinstance(first, ClassificationExample):
        pairs = _encode_pairs(examples, tokenizer, max_length)  # type: ignore[arg-type]
        return ([row] for row in pairs)
    if isinstance(first, ChatExample):
        chats = [e for e in examples if isinstance(e, ChatExample)]
        return _encode_chats(chats, tokenizer, max_length, counted)
    texts = _encode_texts(examples, tokenizer, max_length)  # type: ignore[arg-type]
    return ([row] for row in texts)


def _encode_chats(
    chats: Sequence[ChatExample], tokenizer: Any, max_length: int, counted: Counter[str]
) -> Iterator[list[TokenRow]]:
    """A row with one trained turn loses the beginning of its prompt, as prompts of generation do;
    one with several loses its end. A chat that is refused does not end the iterator."""
    encoder = ChatEncoder(tokenizer)

    def encode(chat: ChatExample) -> list[TokenRow]:
        encoded = encoder.encode(chat)
        counted.update(encoded.counts)
        return [
            _cut(
                TokenRow(row.input_ids, row.loss_mask),
                max_length,
                row.prompt * (len(row.turns) == 1),
            )
            for row in encoded.rows
        ]

    return map(encode, chats)


def encode_prompt(example: TextExample, tokenizer: Any, max_length: int) -> list[int]:
    """The ids of a prompt, as they stand before the completion in training."""
    return _encode_texts([example], tokenizer, max_length)[0].input_ids


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by itself (BOS), without those behind it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def _encode_texts(
    examples: Sequence[TextExample], tokenizer: Any, max_length: int
) -> list[TokenRow]:
    """Segments are tokenised one by one. A text that begins with what the tokenizer would put
    before it, or ends with EOS, gets no second one."""
    prefix = special_prefix(tokenizer)
    pieces = iter(_segment_ids(examples, tokenizer))
    encoded = []
    for example in examples:
        row = TokenRow(list(prefix), [False] * len(prefix))
        prompt_tokens = 0
        for number, segment in enumerate(example.segments):
            piece = next(pieces)
            if prefix and number == 0 and piece[: len(prefix)] == prefix:
                row = TokenRow([], [])
            row.input_ids += piece
            row.loss_mask += [segment.trained] * len(piece)
            if not any(row.loss_mask):
                prompt_tokens = max(0, len(row.input_ids) - len(prefix))
        if example.eos:
            _end(row, example, tokenizer)
        encoded.append(_cut(row, max_length, prompt_tokens, len(prefix)))
    return encoded


def _segment_ids(examples: Sequence[TextExample], tokenizer: Any) -> list[list[int]]:
    """The ids of all segments in order; one behind another has no space of the tokenizer's own."""
    joiner = Joiner(tokenizer)
    segments = [(i, segment.text) for e in examples for i, segment in enumerate(e.segments)]
    if not joiner.adds_space:
        return joiner.ids([text for _, text in segments])
    return [joiner.inside(text) if i else joiner.ids([text])[0] for i, text in segments]


def _end(row: TokenRow, example: TextExample, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no EOS token to end an example with")
    last = example.segments[-1]
    if last.text.rstrip().endswith(tokenizer.eos_token) and eos in row.input_ids:
        return
    row.input_ids.append(eos)
    row.loss_mask.append(last.trained)


def _cut(row: TokenRow, max_length: int, prompt_tokens: int, prefix: int = 0) -> TokenRow:
    """Fit a row into ``max_length``: from the prompt's beginning first, then from the end."""
    over = len(row.input_ids) - max_length
    if over <= 0:
        return row
    from_prompt = min(over, prompt_tokens)
    for values in (row.input_ids, row.loss_mask):
        del values[prefix : prefix + from_prompt]
        del values[max_length:]
    row.truncated, row.cut = True, over > from_prompt
    return row


def _encode_pairs(
    examples: Sequence[ClassificationExample], tokenizer: Any, max_length: int
) -> list[TokenRow]:
    paired = examples[0].text_pair is not None
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:  # the tokenizer would then cut nothing
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
            row.truncated = True
            rows[index] = row
    return rows


def _pair_tokens(
    examples: Sequence[ClassificationExample], tokenizer: Any, paired: bool, **truncation: Any
) -> list[TokenRow]:
    first = [example.text for example in examples]
    second = [example.text_pair for example in examples] if paired else None
    found = tokenizer(first, second, verbose=False, **truncation)
    types: Iterable[Any] = found.get("token_type_ids") or [None] * len(examples)
    return [
        TokenRow(ids, [False] * len(ids), kinds)
        for ids, kinds in zip(found.input_ids, types, strict=True)
    ]
