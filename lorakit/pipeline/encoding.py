"""Tokenize a recipe's rows for training and evaluation, and report what was cut or skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.cache import CACHED_ROWS, EncodedCache, encoding_key
from lorakit.data.encode import EncodedSplit, check_token_ids, encode_split
from lorakit.data.mixture import weights_note
from lorakit.data.notes import endless_warning, split_notes
from lorakit.data.rows import Row
from lorakit.data.sources import Split
from lorakit.data.stream import SkippedRows, Stream
from lorakit.data.stream_steps import StreamEncoder
from lorakit.errors import listed
from lorakit.evaluation.evaluate import EvalData
from lorakit.evaluation.prompts import fit_prompts
from lorakit.evaluation.sampling import eos_ids
from lorakit.models.token_rows import TokenRows
from lorakit.models.window import embedding_rows, window
from lorakit.notes import Say
from lorakit.pipeline.class_weights import class_weights
from lorakit.pipeline.task_data import TaskData
from lorakit.tasks.base import GenerationSection
from lorakit.tasks.checks import ColumnWatch, counts_line, label_counts, similar_labels


@dataclass(frozen=True)
class StreamedRows:
    """A training split that is read and tokenized during training.

    ``watch`` is called with each row and reports what the task does not use of it; ``skipped``
    counts the bad rows; None if a bad row is an error.
    """

    stream: Stream
    encoder: StreamEncoder
    watch: Callable[[Row], None]
    skipped: SkippedRows | None = None


@dataclass(frozen=True)
class TrainingData:
    """The data of a training run: the tokens to train on, and the split to evaluate on.

    ``config`` is the task's configuration, completed from the rows and the model.
    ``class_weights`` are those of a classifier's classes in the loss.
    """

    config: Any
    train: EncodedSplit | StreamedRows
    evaluation: EvalData | None
    class_weights: tuple[float, ...] | None = None


def encode_training_data(
    data: TaskData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    write_cache: bool = True,
) -> TrainingData:
    """Tokenize the train and validation splits, and the prompts to generate from.

    Of a stream, the first rows are tokenized only as a check. Raises DataError for a row or a
    prompt that cannot be used.
    """
    encoder = _Encoder(data, model, tokenizer, say, write_cache)
    encoded = encoder.encode(data.split)
    if data.task.kind == "causal":
        encoder.warn_endless(encoded)
    if note := weights_note(data.split.name, data.stream, encoded.sources):
        say(note)
    weights = class_weights(data, encoded)
    if weights is not None and data.problem != "multi_label_classification":
        encoded = replace(encoded, class_weights=np.array(weights))
    train = encoded if data.stream is None else encoder.streamed(data.stream, encoded.class_weights)
    validation = encoder.encode(data.validation) if data.validation is not None else None
    if data.stream is None:
        for line in _label_lines(data, encoded):
            say(line)
    if weights is not None and data.labels is not None:
        named = zip(data.labels, weights, strict=True)
        say(f"class weights: {listed((f'{label} {weight:.4g}' for label, weight in named), 12)}")
    if data.validation is None or validation is None:
        return TrainingData(data.config, train, None, weights)
    evaluation = encoder.with_prompts(data.validation, validation)
    return TrainingData(evaluation.config, train, evaluation, weights)


def encode_eval_data(
    data: TaskData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
    *,
    write_cache: bool = True,
) -> EvalData:
    """Tokenize the split to evaluate on, and the prompts to generate from.

    Raises DataError for a row or a prompt that cannot be used.
    """
    encoder = _Encoder(data, model, tokenizer, say, write_cache)
    return encoder.with_prompts(data.split, encoder.encode(data.split))


def id_limit(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model accepts."""
    # A model that hashes characters has no embedding table, and accepts any id.
    has_table = isinstance(model.get_input_embeddings(), nn.Embedding | TokenRows)
    return embedding_rows(model) if has_table else 2**31


class _Encoder:
    """Tokenizes the splits of one ``TaskData`` for one model."""

    def __init__(
        self,
        data: TaskData,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        say: Say,
        write_cache: bool,
    ) -> None:
        self._data, self._model, self._tokenizer, self._say = data, model, tokenizer, say
        largest = max(len(split) for split in (data.split, data.validation) if split is not None)
        self._cache = _token_cache(data, tokenizer, largest, say, write_cache)
        self._embedding_rows = id_limit(model)

    def encode(self, split: Split) -> EncodedSplit:
        """Tokenize a split or read its tokens from the cache; report what was cut or skipped."""
        data, max_length = self._data, self._data.config.max_length
        first = split is data.split
        encoded = encode_split(
            split,
            data.example,
            self._tokenizer,
            max_length,
            cache=self._cache,
            skip_bad=first and data.skip_bad_rows,
        )
        check_token_ids(encoded, self._tokenizer, self._embedding_rows)
        if not (first and data.stream):
            for note in split_notes(encoded, split, max_length):
                self._say(note)
        return encoded

    def warn_endless(self, encoded: EncodedSplit) -> None:
        """Warn about training rows whose answer does not end in a token that ends a generation.
        Truncated rows are reported separately."""
        data, stops = self._data, set(eos_ids(self._model, self._tokenizer))
        if endless := encoded.rows_without_eos(stops, cut_to=data.config.max_length):
            self._say(endless_warning(data.split.name, endless, len(encoded)))

    def streamed(self, stream: Stream, weights: NDArray[np.float64] | None) -> StreamedRows:
        """Prepare to tokenize the rows of ``stream`` during training."""
        data = self._data
        watch = ColumnWatch(data.task, data.config, data.split, self._say)
        encoder = StreamEncoder(
            *(data.example, self._tokenizer, data.config.max_length, self._embedding_rows),
            class_weights=weights,
        )
        skipped = SkippedRows(data.split.name, self._say) if data.skip_bad_rows else None
        return StreamedRows(stream, encoder, watch.see, skipped)

    def with_prompts(self, split: Split, encoded: EncodedSplit) -> EvalData:
        """Add the prompts to generate from, if the task generates text."""
        task, config = self._data.task, self._data.config
        if not task.generates(config):
            return EvalData(task, config, split, encoded)
        limit = window(self._model)
        config, prompts = fit_prompts(task, config, split, self._tokenizer, limit, self._say)
        return EvalData(task, config, split, encoded, prompts)


def _token_cache(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, rows: int, say: Say, write: bool
) -> EncodedCache | None:
    """Return the cache for this task's tokens; None for few rows, and for a slow tokenizer."""
    if rows < CACHED_ROWS:
        return None
    # The location of the data, the settings of the generation and weights do not affect tokens.
    unread = {*GenerationSection.model_fields} - {"name", "max_length", "on_bad_row"}
    unread.add("class_weights")
    values = data.config.model_dump(mode="json", exclude=unread)
    values["task"] = f"{type(data.task).__module__}.{type(data.task).__qualname__}"
    key = encoding_key(tokenizer, values, data.task.digest)
    if key is None:
        say("the tokenizer has no fast (Rust) implementation: its tokens are not cached")
        return None
    return EncodedCache(key, say, write)


def _label_lines(data: TaskData, train: EncodedSplit) -> list[str]:
    """Return notes on how many training rows have each label."""
    labels = data.task.labels(data.config, None)
    if labels is None or train.labels is None:
        return []
    counts = label_counts(labels, train.class_ids())
    return [f"labels: {counts_line(counts)}", *similar_labels(counts)]
