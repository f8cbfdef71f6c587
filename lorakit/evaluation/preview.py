"""Encoded rows in words: their text in trained and masked pieces, and a split's figures.

What a model will see of a recipe's data. The tokenizer is loaded, the weights are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.data.chat.turns import common_prefix
from lorakit.data.encode import EncodedSplit, chat_notes, encode_split, skipped_note
from lorakit.data.examples import Example
from lorakit.data.plan import Packing
from lorakit.data.sources import Split
from lorakit.data.tokens import TokenRow, encode_rows
from lorakit.errors import UserError
from lorakit.evaluation.predictions import load_eval_split, settle, with_labels
from lorakit.evaluation.progress import OnProgress
from lorakit.models.heads import declares_head, names_of_head, plan_head
from lorakit.models.hub import explained, hub_options, load_config, load_tokenizer, quiet
from lorakit.models.load import fit_unloaded
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.checks import label_counts, look_alikes

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
    included. ``label`` is an encoder's. ``part`` is the number, from 1, of this row of tokens among
    those that the split's row became, and how many they are.
    """

    where: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    trained: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    truncated: bool
    cut: bool
    label: int | float | None
    part: tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """A split in figures. ``rows`` are the split's; all other counts of rows are of rows of tokens,
    of which a chat may have become several. ``endless_rows`` are those without a token in their
    last trained stretch at which a generation stops; it and ``trained_tokens`` are None for an
    encoder, whose loss is on the label. ``bins`` hold packed rows, ``bin_fill`` is how full they
    are; None where nothing is packed."""

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
    split: Split,
    index: int,
    to_example: ToExample,
    tokenizer: Any,
    max_length: int,
    skip_bad: bool = False,
) -> list[DescribedRow]:
    """The row at ``index`` as ``encode_split`` makes it: one row of tokens, or of a chat as many as
    it becomes. Raises its DataError; with ``skip_bad`` a bad row gives none."""
    alone = [split.rows[index]]
    skip = (lambda index, reason: None) if skip_bad else None
    found = encode_rows(
        alone, lambda _: split.locate(index), to_example, tokenizer, max_length, skip
    )
    labels: list[Any] = found.labels or [None] * len(found.rows)
    return [
        _described(split.locate(index), row, label, tokenizer, (part, len(found.rows)))
        for part, (row, label) in enumerate(zip(found.rows, labels, strict=True), 1)
    ]


def _described(
    where: str, row: TokenRow, label: int | float | None, tokenizer: Any, part: tuple[int, int]
) -> DescribedRow:
    trained = [False, *row.loss_mask[1:]]
    return DescribedRow(
        where=where,
        ids=tuple(row.input_ids),
        tokens=tuple(tokenizer.convert_ids_to_tokens(row.input_ids)),
        trained=tuple(trained),
        pieces=tuple(_pieces(row.input_ids, trained, tokenizer)),
        truncated=row.truncated,
        cut=row.cut,
        label=label,
        part=part,
    )


def summarise(encoded: EncodedSplit, stops: Set[int], packed_to: int | None = None) -> Summary:
    """The figures of all rows; ``stops`` are the ids at which a generation ends, ``packed_to`` the
    tokens of a bin if rows are packed."""
    lengths = encoded.lengths
    packing = Packing(lengths, packed_to, seed=0) if packed_to else None
    causal = encoded.labels is None
    return Summary(
        rows=encoded.counts.rows,
        tokens=int(lengths.sum()),
        min_length=int(lengths.min()),
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        truncated_rows=encoded.counts.truncated_rows,
        trained_tokens=encoded.trained_tokens if causal else None,
        cut_completions=encoded.counts.cut_completions if causal else None,
        endless_rows=encoded.endless_rows(stops) if causal else None,
        bins=len(packing) if packing else None,
        bin_fill=packing.fill if packing else None,
    )


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    """The text in order. A token alone may be half a character, or lack its space: a piece ends
    where all tokens up to its last agree with the whole text, so a character is never split."""
    special = _special_ids(tokenizer)
    text = _decode(ids, tokenizer)
    begin = end = tokens = 0
    kinds = [(flag, token in special) for token, flag in zip(ids, trained, strict=True)]
    for (is_trained, is_special), group in groupby(kinds):
        tokens += len(list(group))
        begin, end = end, max(end, common_prefix(_decode(ids[:tokens], tokenizer), text))
        if begin < end:
            yield Piece(text[begin:end], is_trained, is_special)
    assert end == len(text)


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


Say = Callable[[str], None]


@dataclass(frozen=True)
class Preview:
    """``labels`` are a classifier's class names by id, ``label_counts`` the split's rows of each;
    ``limit`` is the most tokens of a row; ``training_rows`` are the rows of tokens that the split
    becomes."""

    task: str
    split: str
    limit: int
    labels: list[str] | None
    label_counts: dict[str, int] | None
    examples: list[DescribedRow]
    summary: Summary
    training_rows: int


def preview(
    recipe: Recipe,
    *,
    split: str = "train",
    start: int = 1,
    count: int = 3,
    limit: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
    say: Say,
) -> Preview:
    """``count`` rows from row ``start`` (from 1), and the figures of the split, or of its first
    ``limit`` rows; ``say`` gets the notes. Raises UserError as training does for data and
    tokenizer, and for a ``start`` behind the last row.
    """
    task: Task = registry.task(recipe.task.name)
    found = load_eval_split(task, recipe.task, split, limit, skip_bad=True)
    if start > len(found):
        raise UserError(
            f"--start {start}: {found.source} has {len(found):,} rows"
            + (f" with --limit {limit}" if limit is not None else "")
            + f"; allowed: 1 to {len(found)}"
        )
    task, config = settle(task, recipe.task, found, say)
    by_head = partial(names_of_head, recipe.model)
    config = with_labels(task, config, None, found, by_head, say)
    skip_bad = split == "train" and config.on_bad_row == "skip"
    model_config = load_config(recipe.model)
    config = fit_unloaded(model_config, config, say, recipe.model.trust_remote_code)
    tokenizer, stops = _load_tokenizer(recipe.model, model_config, say)
    encoded = encode_split(
        found,
        lambda row: task.example(row, config),
        tokenizer,
        config.max_length,
        on_progress=lambda done: on_progress(done, len(found)),
        skip_bad=skip_bad,
    )
    skipped = skipped_note(encoded.counts, found.name, found.locate)
    for note in [*([skipped] if skipped else []), *chat_notes(encoded.counts, found.name)]:
        say(note)
    summary = summarise(encoded, stops, config.max_length if config.packing else None)
    rows = range(start - 1, min(start - 1 + count, len(found)))
    examples = [
        described
        for i in rows
        for described in describe_row(
            found, i, lambda r: task.example(r, config), tokenizer, config.max_length, skip_bad
        )
    ]
    labels = task.labels(config, None) if task.kind == "encoder" else None
    if task.kind == "encoder":
        _say_head(recipe.model, model_config, labels, say)
    counts = label_counts(labels, encoded.labels) if labels and encoded.labels else None
    for line in look_alikes(counts or {}):
        say(line)
    return Preview(
        task=config.name,
        split=found.name,
        limit=config.max_length,
        labels=labels,
        label_counts=counts,
        examples=examples,
        summary=summary,
        training_rows=len(encoded),
    )


def _say_head(
    section: ModelSection, config: PreTrainedConfig, labels: list[str] | None, say: Say
) -> None:
    """Say how the task's labels stand in the base's head, if it was saved with one. Raises
    ModelError, as training does, for a head that does not fit."""
    if declares_head(config):
        note = plan_head(labels, config, section.new_head, section.name_or_path).note
        if note:
            say(note)


def _load_tokenizer(
    section: ModelSection, config: PreTrainedConfig, say: Say
) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """The tokenizer, and the ids at which the model ends a generation."""
    tokenizer, notes = load_tokenizer(section.name_or_path, hub_options(section))
    for note in notes:
        say(note)
    with explained(section.name_or_path), quiet():
        try:
            own = GenerationConfig.from_pretrained(
                section.name_or_path, **hub_options(section)
            ).eos_token_id
        except OSError:  # it has none: the model then takes its configuration's
            own = getattr(config.get_text_config(), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return tokenizer, {token for token in ids if isinstance(token, int)}
