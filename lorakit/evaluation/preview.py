"""What a model will see of a recipe's data. The tokenizer is loaded, the weights are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.data.describe import DescribedRow, Summary, describe_row, summarise
from lorakit.data.encode import encode_split
from lorakit.data.notes import chat_notes, skipped_note
from lorakit.errors import UserError
from lorakit.evaluation.splits import load_eval_split, settle, with_labels
from lorakit.evaluation.watch import OnProgress
from lorakit.models.head_names import names_of_head
from lorakit.models.heads import declares_head, plan_head
from lorakit.models.load import explained, hub_options, load_config, quiet
from lorakit.models.tokenizer import load_tokenizer
from lorakit.models.window import fit_unloaded
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.label_counts import label_counts, look_alikes

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
