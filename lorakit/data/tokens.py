"""Tokenize examples into token ids and the mask of those that count in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.chat import ChatEncoder
from lorakit.data.chat.ids import Joiner
from lorakit.data.examples import ChatExample, ClassificationExample, Example, TextExample
from lorakit.data.rows import Row, RowSequence, UnreadRow
from lorakit.errors import DataError, ModelError

#: How many bad rows are named; all are counted.
NAMED_ROWS = 5


@dataclass
class Counts:
    """Counts of a split's rows.

    ``rows`` counts rows of the source, each of which may become several rows of tokens if it is a
    chat; ``truncated_rows`` and ``cut_completions`` count rows of tokens. ``skipped_rows`` were
    skipped as bad; ``skipped`` has the index and reason of the first ones. ``notes`` are the counts
    of ``lorakit.data.chat.encode``, by name.
    """

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


#: Called with the index of a skipped row and the reason.
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
    """``rows`` in order, one per source row or, for a chat, several. ``labels`` has one label per
    row for an encoder."""

    rows: list[TokenRow]
    labels: list[int | float]
    counts: Counts


def encode_rows(
    rows: RowSequence,
    locate: Callable[[int], str],
    to_example: Callable[[Row], Example],
    tokenizer: Any,
    max_length: int,
    skip: OnBadRow | None = None,
) -> EncodedRows:
    """Tokenize rows. ``locate`` returns the file and row of an index.

    Raises DataError, with file and row, for a row that cannot be read, that the task rejects or
    that has no token to train on. With ``skip``, such rows are skipped, and it is called with the
    index and the reason.
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
    """The rows of an example that have a trained token. Raises DataError if there are none."""
    if isinstance(example, ClassificationExample):
        return rows
    trained = [row for row in rows if any(row.loss_mask[1:])]
    if not trained:
        within = f" within task.max_length = {max_length}" if rows[0].truncated else ""
        raise DataError(f"nothing to train on{within}")
    return trained


def _encode_examples(
    examples: Sequence[Example], tokenizer: Any, max_length: int, counted: Counter[str]
) -> Iterable[list[TokenRow]]:
    """Return the rows of each example; all examples are of one kind. ``counted`` is updated with
    the counts of ``ChatEncoder``.

    A prompt that is too long loses its beginning, so that the completion and its EOS are kept; a
    completion that is too long by itself loses its end. Raises DataError for an example, either
    immediately or when its rows are taken from the iterator.
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
    """A row with one trained turn loses the beginning of its prompt, as prompts do in generation; a
    row with several loses its end. After an error, the iterator continues with the next chat."""
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
    """The ids of a prompt, the same as those before the completion in training."""
    return _encode_texts([example], tokenizer, max_length)[0].input_ids


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer adds before a text (BOS), without those that it adds after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _encode_texts(
    examples: Sequence[TextExample], tokenizer: Any, max_length: int
) -> list[TokenRow]:
    """Segments are tokenized separately. A text that already begins with BOS or ends with EOS does
    not get a second one."""
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
            _append_eos(row, example, tokenizer)
        encoded.append(_cut(row, max_length, prompt_tokens, len(prefix)))
    return encoded


def _segment_ids(examples: Sequence[TextExample], tokenizer: Any) -> list[list[int]]:
    """The ids of all segments in order. A segment that follows another does not get the leading
    space that some tokenizers add."""
    joiner = Joiner(tokenizer)
    segments = [(i, segment.text) for e in examples for i, segment in enumerate(e.segments)]
    if not joiner.adds_space:
        return joiner.ids([text for _, text in segments])
    return [joiner.inside(text) if i else joiner.ids([text])[0] for i, text in segments]


def _append_eos(row: TokenRow, example: TextExample, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which ends each example; "
            "hint: set eos_token in its tokenizer_config.json"
        )
    last = example.segments[-1]
    if last.text.rstrip().endswith(tokenizer.eos_token) and eos in row.input_ids:
        return
    row.input_ids.append(eos)
    row.loss_mask.append(last.trained)


def _cut(row: TokenRow, max_length: int, prompt_tokens: int, prefix: int = 0) -> TokenRow:
    """Truncate a row to ``max_length``, first at the beginning of its prompt, then at its end."""
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
