"""Recipe -> the rows of its splits, and their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.data.encode import EncodedSplit, check_token_ids, encode_split, split_notes
from lorakit.data.paths import no_split
from lorakit.data.sources import Split
from lorakit.data.stream import SkippedRows, Stream, open_stream
from lorakit.data.stream_steps import StreamEncoder
from lorakit.errors import DataError, UserError
from lorakit.evaluation.predictions import encoding_cache, resolve_labels, settle
from lorakit.evaluation.sampling import eos_ids
from lorakit.models.heads import names_of_head
from lorakit.models.load import embedding_rows
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.checks import AbsentWatch, UnusedWatch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Streamed:
    """A train split that is read while it is trained on; ``skipped`` where bad rows are skipped."""

    stream: Stream
    encoder: StreamEncoder
    skipped: SkippedRows | None = None


@dataclass(frozen=True)
class Rows:
    """``train`` is the split, or of a stream its first rows. ``config`` is the task's, with what
    the rows decided written in."""

    task: Task
    config: Any
    train: Split
    stream: Stream | None
    validation: Split | None

    @property
    def labels(self) -> list[str] | None:
        return self.task.labels(self.config, None if self.stream else self.train)


def load_rows(recipe: Recipe, say: Say) -> Rows:
    """Raises DataError for data that cannot be read or is not the task's."""
    task: Task = registry.task(recipe.task.name)
    config = recipe.task
    task.check_requirements(config)
    stream = _open_stream(task, config) if config.streaming else None
    train = stream.head if stream else task.load(config, "train")
    if train is None:
        raise _no_train_split(task, config)
    task, config = settle(task, config, train, say)
    if stream:
        task.check_columns(train, config)
    validation = task.load(config, task.eval_split(config))
    if validation is not None:
        settle(task, config, validation, say)
    splits = [split for split in (train, validation) if split is not None]
    by_head = partial(names_of_head, recipe.model)
    config = resolve_labels(task, config, None if stream else train, splits, by_head, say)
    return Rows(task, config, train, stream, validation)


def encode_rows(
    rows: Rows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    write_cache: bool,
) -> tuple[EncodedSplit | Streamed, EncodedSplit | None]:
    """The tokens of the train and the validation split. Of a stream the first rows are tokenised
    only to see whether they can be."""
    task, config = rows.task, rows.config
    skip_bad = config.on_bad_row == "skip"
    splits = [split for split in (rows.train, rows.validation) if split is not None]
    most = max(map(len, splits))
    cache = encoding_cache(task, config, tokenizer, most, say, write_cache)
    has_table = isinstance(model.get_input_embeddings(), nn.Embedding)

    def to_example(row: Any) -> Any:
        return task.example(row, config)

    def encoded(split: Split) -> EncodedSplit:
        found = encode_split(
            split,
            to_example,
            tokenizer,
            config.max_length,
            cache=cache,
            skip_bad=skip_bad and split is rows.train,
        )
        if has_table:
            check_token_ids(found, tokenizer, embedding_rows(model))
        if not (rows.stream and split is rows.train):
            for note in split_notes(found, split, config.max_length):
                say(note)
        if split is rows.train and task.kind == "causal":
            stops = set(eos_ids(model, tokenizer))
            _say_endless(found, split.name, config.max_length, stops, say)
        return found

    train: EncodedSplit | Streamed = encoded(rows.train)
    if rows.stream:
        largest = embedding_rows(model) if has_table else 2**31
        watches = [watch(task, config, rows.train, say) for watch in (UnusedWatch, AbsentWatch)]

        def streamed_example(row: Any) -> Any:
            for watch in watches:
                watch.see(row)
            return to_example(row)

        encoder = StreamEncoder(streamed_example, tokenizer, config.max_length, largest)
        train = Streamed(rows.stream, encoder, SkippedRows("train", say) if skip_bad else None)
    return train, encoded(rows.validation) if rows.validation is not None else None


def _say_endless(
    encoded: EncodedSplit, name: str, max_length: int, stops: set[int], say: Say
) -> None:
    """Warn of rows whose answer ends without a token at which a generation stops, unless they are
    cut, which is said elsewhere."""
    if endless := encoded.endless_rows(stops, cut_to=max_length):
        say(
            f"warning: {name}: {endless:,} of {len(encoded):,} rows do not end in a trained EOS: "
            "nothing there teaches the model to stop"
        )


def _no_train_split(task: Task, config: Any) -> DataError:
    if config.path is not None:
        return no_split(config.path, "train")
    source = "/".join(part for part in task.hub_source(config) or () if part)
    return DataError(f"{source}: no split 'train'")


def _open_stream(task: Task, config: Any) -> Stream | None:
    if type(task).read_file is not Task.read_file:
        raise UserError(
            f"task.streaming = true: {config.name} reads files of its own format whole; "
            "allowed: false"
        )
    skip_bad = config.on_bad_row == "skip"
    return open_stream(config.path, "train", task.hub_source(config), config.limit_train, skip_bad)
