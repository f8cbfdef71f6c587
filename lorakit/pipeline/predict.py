"""Use a classifier or a regressor: ``lorakit.predict``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.base_model import other_base_note
from lorakit.adapters.load import FoundModel, find_model
from lorakit.adapters.peft.method import run_method_file
from lorakit.data.encode import EncodedSplit, check_token_ids, encode_split
from lorakit.data.notes import encoding_notes
from lorakit.errors import AdapterError, ModelError, UserError
from lorakit.evaluation.classify import check_finite, class_logits, softmax
from lorakit.evaluation.progress import OnProgress, ProgressMonitor
from lorakit.host.openmp import yield_cores
from lorakit.models.heads import head_labels
from lorakit.models.hub import load_config
from lorakit.models.kinds import check_kind
from lorakit.models.load import default_device
from lorakit.models.window import position_limit, window
from lorakit.notes import Say, to_stderr
from lorakit.pipeline.encoding import id_limit
from lorakit.pipeline.predict_entities import EntityFinder
from lorakit.pipeline.prediction_input import (
    Given,
    InputRows,
    arity_note,
    file_rows,
    find_columns,
    given_rows,
)


@yield_cores()
def predict(
    model: str | Path,
    texts: str | Sequence[Given] | None = None,
    adapter: str | Path | None = None,
    *,
    file: str | Path | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    method: str | PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    say: Say = to_stderr,
) -> list[dict[str, Any]]:
    """Classify ``texts``, or the rows of ``file``, and return one dictionary each, in their order.

    ``model`` is a base, if ``adapter`` is given, or an adapter directory, or a classifier such as a
    merged model. ``texts`` are texts, pairs (text, second text), or rows with columns. A row's
    columns are ``text_column`` and ``text_pair_column``, or else those that the adapter was trained
    on, or the only possible ones.

    For one label per text the result is ``{"label": NAME, "score": p, "scores": {NAME: p}}`` with
    the softmax of the logits. For ``multi_label_classification`` the scores are the sigmoid of each
    logit, and ``"labels": [NAME, ...]`` are the names with p >= 0.5. For a regression it is
    ``{"score": value}``. For tags of words it is ``{"entities": [...]}``: see ``EntityFinder``.

    Texts are truncated to ``max_length`` tokens, by default that of the adapter's training, or else
    of the model. ``dtype`` is by default that of the training, or else of the checkpoint. The
    default ``device`` is an accelerator if there is one. ``method`` is the ``FILE.py:CLASS`` of the
    user's method that trained the adapter; its code is run. ``on_progress`` receives the rows done
    and the total; notes go to ``say``.

    Raises UserError for a model that is not a classifier, an adapter that does not fit and a row
    that has no text, and EvaluationError for outputs that are not finite.
    """
    _check_arguments(texts, file, batch_size)
    run_method_file(method)
    found = find_model(
        model, adapter, revision=revision, trust_remote_code=trust_remote_code, say=say
    )
    _check_classifies(found)
    rows = _input_rows(found, texts, file, (text_column, text_pair_column), say)
    loaded, tokenizer = _load(found, dtype, device, say)
    names = _class_names(loaded, found.directory)
    length = _max_length(loaded, tokenizer, max_length, found, paired=len(rows.columns) == 2)
    encoded = _encoded(rows, tokenizer, length, id_limit(loaded), say)
    monitor = ProgressMonitor(len(encoded), on_progress)
    if rows.joins_words:
        finder = EntityFinder(loaded, tokenizer, found.directory)
        given = [rows.example(row).text for row in rows.split.rows]
        return finder.find(given, encoded, batch_size, length, monitor)
    logits = class_logits(loaded, tokenizer, encoded, batch_size, monitor)
    check_finite(logits, found.directory)
    return _described(logits, names, loaded.config)


def _check_arguments(texts: object, file: object, batch_size: int) -> None:
    if (texts is None) == (file is None):
        raise UserError("predict: texts and file: allowed: one of them")
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: allowed: 1 or more")


def _input_rows(
    found: FoundModel,
    texts: str | Sequence[Given] | None,
    file: str | Path | None,
    columns: tuple[str | None, str | None],
    say: Say,
) -> InputRows:
    """The texts as ``found`` takes them; ``columns`` are those of ``predict``."""
    trained = _sidecar(found).get("text_columns") or ()
    if file is not None:
        split = file_rows(file)
        rows = InputRows(split, find_columns(split, *columns, trained))
    else:
        given = [texts] if isinstance(texts, str) else texts or ()
        rows = given_rows(given, *columns, trained)
    joins_words = found.is_token_classifier()
    if joins_words and len(rows.columns) == 2:
        raise UserError(
            f"{found.directory}: a token classifier takes single texts, not pairs; allowed: one "
            "text column"
        )
    if note := arity_note(rows.columns, trained):
        say(note)
    return replace(rows, joins_words=joins_words)


def _check_classifies(found: FoundModel) -> None:
    """Raise AdapterError or ModelError for anything but a classifier."""
    if found.classifies():
        return
    name = found.directory
    if found.files is not None:
        raise AdapterError(
            f"{name}: the adapter is for a causal language model; hint: use lorakit generate"
        )
    config = load_config(found.section)
    try:
        check_kind(config, "causal", name)
    except ModelError as error:
        raise ModelError(
            f"{name}: {config.model_type} without a classification head; allowed: a classifier, or "
            "a base together with the adapter of a classifier"
        ) from error
    raise ModelError(
        f"{name}: {config.model_type} is a causal language model; hint: use lorakit generate"
    )


def _load(
    found: FoundModel, dtype: str | None, device: str | torch.device | None, say: Say
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = torch.device(device) if device is not None else default_device()
    chosen = found.dtype_on(place, dtype, say)
    if found.files is not None and (note := other_base_note(found.section, found.files)):
        say(note)
    model, tokenizer = found.load(chosen, say=say)
    model.to(place)  # type: ignore[arg-type]
    return model, tokenizer


def _encoded(
    rows: InputRows, tokenizer: PreTrainedTokenizerBase, length: int, limit: int, say: Say
) -> EncodedSplit:
    encoded = encode_split(rows.split, rows.example, tokenizer, length)
    check_token_ids(encoded, tokenizer, limit)
    for note in encoding_notes(encoded.counts, rows.split.source, len(encoded), length):
        say(note)
    return encoded


def _class_names(model: PreTrainedModel, name: str) -> list[str]:
    names = head_labels(model.config)
    if twice := [label for label in names if names.count(label) > 1]:
        raise ModelError(f"{name}: its labels include {twice[0]!r} more than once")
    return names


def _max_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int | None,
    found: FoundModel,
    paired: bool,
) -> int:
    """``wanted``, or that of the training, or of the model. Raises UserError if it does not fit."""
    limit, special = position_limit(model), tokenizer.num_special_tokens_to_add(pair=paired)
    if wanted is not None:
        if wanted <= special or (limit is not None and wanted > limit):
            allowed = f"{special + 1} or more" if limit is None else f"{special + 1} to {limit}"
            raise UserError(f"max_length = {wanted}: allowed for this model: {allowed}")
        return wanted
    trained = _sidecar(found).get("max_length") or 0
    sizes = [limit, trained] if trained > special else [window(model), tokenizer.model_max_length]
    return min(size for size in sizes if size)


def _sidecar(found: FoundModel) -> dict[str, Any]:
    return (found.files.sidecar if found.files else None) or {}


def _described(
    logits: NDArray[np.float32], names: Sequence[str], config: PreTrainedConfig
) -> list[dict[str, Any]]:
    kind = config.problem_type
    if kind == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits.clip(-80, 80)))
        return [_several(dict(zip(names, row, strict=True))) for row in scores.tolist()]
    if kind == "regression" or len(names) == 1:
        return [_value(names, row) for row in logits.tolist()]
    return [_best(dict(zip(names, row, strict=True))) for row in softmax(logits).tolist()]


def _best(scores: dict[str, float]) -> dict[str, Any]:
    label = max(scores, key=scores.__getitem__)
    return {"label": label, "score": scores[label], "scores": scores}


def _several(scores: dict[str, float]) -> dict[str, Any]:
    labels = [name for name, p in scores.items() if p >= 0.5]
    best = max(scores, key=scores.__getitem__)
    return {"label": best, "score": scores[best], "labels": labels, "scores": scores}


def _value(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    if len(values) == 1:
        return {"score": values[0]}
    return {"scores": dict(zip(names, values, strict=True))}
