"""Show a recipe's rows as the model will see them, for ``lorakit preview``.

Only the tokenizer and the configuration are loaded, not the model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lorakit.data.chat.turns import common_prefix
from lorakit.data.counts import SPLIT_DOCUMENTS
from lorakit.data.encode import EncodedSplit, encode_split
from lorakit.data.examples import Example
from lorakit.data.mixture import weights_note
from lorakit.data.notes import chat_notes, endless_warning, skipped_note
from lorakit.data.plan import Packing
from lorakit.data.sources import Split
from lorakit.data.texts import TokenRow
from lorakit.data.tokens import RowEncoder
from lorakit.errors import UserError, counted
from lorakit.evaluation.progress import OnProgress
from lorakit.evaluation.sampling import stop_ids
from lorakit.models.heads import classifies_texts_only, declares_head, plan_head
from lorakit.models.hub import explained, hub_options, load_config, load_tokenizer, quiet
from lorakit.models.vocabulary import extend_tokenizer
from lorakit.models.window import fit_unloaded
from lorakit.notes import Say
from lorakit.pipeline.task_data import TaskData, load_task_data
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.checks import label_counts, similar_labels
from lorakit.tasks.labelling import flagged_classes


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens of one kind, as text; ``special`` marks the tokenizer's special tokens."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class DescribedRow:
    """A row of tokens. ``where`` is its file and row, ``tokens`` the ids' names in the vocabulary.

    ``loss_mask`` marks the tokens that count in the loss, never the first, which is not predicted.
    ``truncated`` rows lost tokens; ``cut`` rows lost the end of the trained text, including EOS.
    ``label`` is set for encoders only; several labels, of the row or of its words, are their class
    indices. ``part`` is (number of this row from 1, number of rows) among the rows of tokens that
    the split's row becomes.
    """

    where: str
    input_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    loss_mask: tuple[bool, ...]
    pieces: tuple[Piece, ...]
    truncated: bool
    cut: bool
    label: int | float | tuple[int, ...] | None
    part: tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """Statistics of a split.

    ``rows`` counts the split's rows; all other counts refer to rows of tokens, of which a chat or a
    document may have several. ``tokens`` does not include the ``lost_tokens`` of truncated rows.
    ``rows_without_eos`` have no token in their last trained segment that ends a generation. Counts
    of trained tokens and completions are None for an encoder, whose loss is on the label. ``bins``
    is the number of packed bins, ``bin_fill`` the fraction of their tokens that is used; None
    without packing.
    """

    rows: int
    tokens: int
    min_length: int
    mean_length: float
    max_length: int
    truncated_rows: int
    lost_tokens: int
    trained_tokens: int | None
    cut_completions: int | None
    rows_without_eos: int | None
    bins: int | None
    bin_fill: float | None

    @property
    def trained_share(self) -> float | None:
        return None if self.trained_tokens is None else self.trained_tokens / self.tokens


@dataclass(frozen=True)
class Preview:
    """Some rows of a split, and statistics of the split.

    ``limit`` is the maximum number of tokens in a row. ``labels`` are a classifier's class names by
    index, and ``label_counts`` the number of rows with each. ``training_rows`` is the number of
    rows of tokens that the split becomes.
    """

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
    """Return ``count`` rows from row ``start`` (counted from 1), and statistics of the split.

    ``limit`` previews only the first N rows, without a note on how many of a mixture an epoch
    draws. Notes go to ``say``. Raises UserError, as training
    does, for data or a tokenizer that cannot be used, and for a ``start`` after the last row.
    """
    data = load_task_data(recipe, split, limit=limit, skip_bad_rows=True, say=say)
    _check_start(start, data, limit)
    section = recipe.model
    model_config = load_config(section)
    config = fit_unloaded(model_config, data.config, say, section.trust_remote_code)
    data = replace(data, config=config)
    tokenizer, stops = _load_tokenizer(section, model_config, say)
    encoded = _encode(data, tokenizer, on_progress, say)
    summary = summarize(encoded, stops, config.max_length, config.packing)
    if limit is None and (note := weights_note(data.split.name, data.stream, encoded.sources)):
        say(note)
    examples = _described(data, tokenizer, start - 1, count)
    labels = data.labels if data.task.kind == "encoder" else None
    if data.task.kind == "encoder":
        _say_head(section, model_config, data, say)
    counts = label_counts(labels, encoded.class_ids()) if labels and encoded.labels else None
    for line in similar_labels(counts or {}):
        say(line)
    if summary.rows_without_eos:
        say(endless_warning(data.split.name, summary.rows_without_eos, len(encoded)))
    return Preview(
        task=config.name,
        split=data.split.name,
        limit=config.max_length,
        labels=labels,
        label_counts=counts,
        examples=examples,
        summary=summary,
        training_rows=len(encoded),
    )


def _check_start(start: int, data: TaskData, limit: int | None) -> None:
    rows = len(data.split)
    if start > rows:
        limited = f" with --limit {limit}" if limit is not None else ""
        raise UserError(
            f"--start {start}: {data.split.source} has {counted(rows, 'row')}{limited}; "
            f"allowed: 1 to {rows}"
        )


def _encode(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress,
    say: Say,
) -> EncodedSplit:
    split = data.split
    encoded = encode_split(
        split,
        data.example,
        tokenizer,
        data.config.max_length,
        on_progress=lambda done: on_progress(done, len(split)),
        skip_bad=data.skip_bad_rows,
    )
    skipped = skipped_note(encoded.counts, split.name, split.locate)
    for note in [*([skipped] if skipped else []), *chat_notes(encoded.counts, split.name)]:
        say(note)
    return encoded


def _described(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, first: int, count: int
) -> list[DescribedRow]:
    return [
        described
        for index in range(first, min(first + count, len(data.split)))
        for described in describe_row(
            data.split, index, data.example, tokenizer, data.config.max_length, data.skip_bad_rows
        )
    ]


def _say_head(section: ModelSection, config: PreTrainedConfig, data: TaskData, say: Say) -> None:
    """Report how the task's labels map to the base's classification head, if it has one.

    Raises ModelError, as training does, for a head that does not fit.
    """
    if declares_head(config) and not classifies_texts_only(config, data.problem):
        name, labels = section.name_or_path, data.labels
        if note := plan_head(labels, config, section.new_head, name, data.problem).note:
            say(note)


def _load_tokenizer(
    section: ModelSection, config: PreTrainedConfig, say: Say
) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """Return the tokenizer, and the ids that end a generation."""
    tokenizer, notes = load_tokenizer(section.name_or_path, hub_options(section))
    for note in (*notes, *extend_tokenizer(tokenizer, section).notes):
        say(note)
    with explained(section.name_or_path), quiet():
        try:
            eos = GenerationConfig.from_pretrained(
                section.name_or_path, **hub_options(section)
            ).eos_token_id
        except OSError:  # without a generation config, the model's configuration is used
            eos = getattr(config.get_text_config(), "eos_token_id", None)
    return tokenizer, set(stop_ids(tokenizer, eos))


def describe_row(
    split: Split,
    index: int,
    to_example: Callable[[Mapping[str, Any]], Example],
    tokenizer: Any,
    max_length: int,
    skip_bad: bool = False,
) -> list[DescribedRow]:
    """Tokenize the row at ``index`` as ``encode_split`` does; a chat may become several rows.

    Raises DataError for a bad row, or returns nothing if ``skip_bad``.
    """
    skip = (lambda index, reason: None) if skip_bad else None
    encoder = RowEncoder(to_example, tokenizer, max_length)
    found = encoder.encode([split.rows[index]], lambda _: split.locate(index), skip)
    labels: list[Any] = found.labels or [None] * len(found.rows)
    return [
        _describe_tokens(split.locate(index), row, label, tokenizer, (part, len(found.rows)))
        for part, (row, label) in enumerate(zip(found.rows, labels, strict=True), 1)
    ]


def summarize(
    encoded: EncodedSplit, stops: Set[int], max_length: int, packed: bool = False
) -> Summary:
    """Return statistics of all rows. ``stops`` are the ids that end a generation, ``max_length`` is
    the capacity of a bin in tokens, if rows are ``packed``."""
    lengths = encoded.lengths
    packing = Packing(lengths, max_length, seed=0) if packed else None
    causal = encoded.labels is None
    parts_end_at = max_length if encoded.counts.notes[SPLIT_DOCUMENTS] else None
    return Summary(
        rows=encoded.counts.rows,
        tokens=int(lengths.sum()),
        min_length=int(lengths.min()),
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        truncated_rows=encoded.counts.truncated_rows,
        lost_tokens=encoded.counts.lost_tokens,
        trained_tokens=encoded.trained_tokens if causal else None,
        cut_completions=encoded.counts.cut_completions if causal else None,
        rows_without_eos=encoded.rows_without_eos(stops, parts_end_at) if causal else None,
        bins=len(packing) if packing else None,
        bin_fill=packing.fill if packing else None,
    )


def _describe_tokens(
    where: str,
    row: TokenRow,
    label: int | float | tuple[int, ...] | None,
    tokenizer: Any,
    part: tuple[int, int],
) -> DescribedRow:
    ids, loss_mask = row.input_ids.tolist(), row.loss_mask.tolist()
    if label is None:
        loss_mask[0] = False
    if isinstance(label, tuple) and row.words is None:
        label = tuple(flagged_classes(label))
    return DescribedRow(
        where=where,
        input_ids=tuple(ids),
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        loss_mask=tuple(loss_mask),
        pieces=tuple(_pieces(ids, loss_mask, tokenizer)),
        truncated=row.truncated,
        cut=row.cut,
        label=label,
        part=part,
    )


def _pieces(ids: Sequence[int], loss_mask: Sequence[bool], tokenizer: Any) -> Iterator[Piece]:
    """Split the text into pieces, in order.

    A single token may decode to an incomplete character or lose its space, so a piece ends only
    where all tokens so far decode to a prefix of the text.
    """
    special = _special_ids(tokenizer)
    text = _decode(ids, tokenizer)
    begin = end = tokens = 0
    kinds = [(flag, token in special) for token, flag in zip(ids, loss_mask, strict=True)]
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
