"""What the command line and Python callers share above training and adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.adapters.load import dtype_name
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.data.encode import check_token_ids, encode_split, split_notes
from lorakit.distributed import processes
from lorakit.errors import AdapterError, UserError
from lorakit.evaluation.evaluate import evaluate_model
from lorakit.evaluation.predictions import encoding_cache, load_eval_split, settle, with_labels
from lorakit.evaluation.progress import OnPhase
from lorakit.evaluation.prompts import check_all_prompts
from lorakit.models.heads import declares_head, find_labels, head_labels, names_of_head
from lorakit.models.hub import load_config, load_tokenizer
from lorakit.models.load import (
    Kind,
    Pretrained,
    default_device,
    embedding_rows,
    fit_max_length,
    load_pretrained,
    window,
)
from lorakit.openmp import yield_cores
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Prediction, Task

Say = Callable[[str], None]


@dataclass(frozen=True)
class SplitEvaluation:
    """``predictions`` are in the split's order, empty for a task that is measured by its loss."""

    task: str
    split: str
    examples: int
    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    recipe: Recipe,
    adapter: str | Path | None = None,
    *,
    base: bool = False,
    split: str | None = None,
    limit: int | None = None,
    on_progress: OnPhase | None = None,
) -> dict[str, float]:
    """The metrics of ``recipe``'s task with an adapter, or with ``base`` those of the bare model.

    ``adapter`` is a directory in PEFT's format, by default the one that training the recipe
    writes. ``split`` and ``limit`` (first N rows) go before what task and recipe say.
    ``on_progress`` gets the phase ("loss", "generated", "evaluated"), rows done and rows in all.
    Under ``torchrun`` or ``accelerate launch`` the processes share the rows, and all return the
    same. Notes go to stderr. Raises UserError for what is missing or does not fit, EvaluationError
    for a metric that is not finite.
    """
    return evaluate_split(
        recipe, adapter, base=base, split=split, limit=limit, on_progress=on_progress
    ).metrics


@yield_cores()
def evaluate_split(
    recipe: Recipe,
    adapter: str | Path | None = None,
    *,
    base: bool = False,
    split: str | None = None,
    limit: int | None = None,
    on_progress: OnPhase | None = None,
    say: Say = lambda text: print(text, file=sys.stderr),
) -> SplitEvaluation:
    """``evaluate`` with the predictions; ``say`` gets the notes."""
    if base and adapter is not None:
        raise UserError(f"evaluate: base=True and adapter={str(adapter)!r}; allowed: one of them")
    processes.init_process_group()
    task: Task = registry.task(recipe.task.name)
    task.check_requirements(recipe.task)
    files = None if base else _read(recipe, adapter, task, say)
    found = load_eval_split(task, recipe.task, split, limit)
    task, config = settle(task, recipe.task, found, say)
    by_head = partial(names_of_head, recipe.model)
    config = with_labels(task, config, _trained_labels(files), found, by_head, say)
    labels = task.labels(config, None)
    if files is not None:
        _check_labels(files, labels)
    seed = recipe.train.seed
    model, tokenizer = _load_with(recipe.model, task.kind, labels, files, seed, say)
    config = fit_max_length(model, config, say)
    cache = encoding_cache(task, config, tokenizer, len(found), say, write=processes.is_main())
    encoded = encode_split(
        found, lambda row: task.example(row, config), tokenizer, config.max_length, cache=cache
    )
    check_token_ids(encoded, tokenizer, embedding_rows(model))
    for note in split_notes(encoded, found, config.max_length):
        say(note)
    if task.generates(config):
        config = check_all_prompts(task, config, found, tokenizer, window(model), say)
    result = evaluate_model(
        model,
        tokenizer,
        task,
        config,
        found,
        encoded,
        batch_size=recipe.eval_batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    return SplitEvaluation(config.name, found.name, len(found), result.metrics, result.predictions)


def _read(recipe: Recipe, adapter: str | Path | None, task: Task, say: Say) -> AdapterFiles:
    directory = Path(adapter) if adapter is not None else Path(recipe.train.output_dir) / "adapter"
    if adapter is None and not directory.exists():
        raise AdapterError(
            f"{directory}: no such adapter directory, and the recipe's train.output_dir has no "
            "other; train it first, name one with --adapter, or take the bare model with --base"
        )
    files = read_adapter(directory, say)
    if files.classifies != (task.kind == "encoder"):
        made_for = "classification" if files.classifies else "causal language models"
        raise AdapterError(
            f"{directory}: the adapter is for {made_for}, and the task {recipe.task.name} is not"
        )
    return files


def _trained_labels(files: AdapterFiles | None) -> list[str] | None:
    """The class names that the adapter was trained with, in the order of the task."""
    labels = (files.sidecar or {}).get("labels") if files else None
    return list(labels) if labels else _head_names(files)


def _head_names(files: AdapterFiles | None) -> list[str] | None:
    """The class names that lorakit wrote beside the adapter, in the order of its head."""
    names = (files.sidecar or {}).get("id2label") if files else None
    return [str(names[key]) for key in sorted(names, key=int)] if names else None


def _check_labels(files: AdapterFiles, labels: Sequence[str] | None) -> None:
    trained = _trained_labels(files)
    if labels and trained and list(labels) != trained:
        raise AdapterError(
            f"{files.directory}: trained on the labels {', '.join(trained)}; "
            f"the task has {', '.join(labels)}"
        )


def _load_with(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None,
    files: AdapterFiles | None,
    seed: int,
    say: Say,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, with the adapter of ``files`` in place and its tokenizer where it has one."""
    given = files is not None and files.brings_head
    if files is not None and given and labels is not None:
        labels = _head_names(files) or _base_names(section, files, labels)
    loaded = load_pretrained(section, kind, labels, seed=seed, head_given=given)
    tokenizer, notes = loaded.tokenizer, loaded.notes
    if files is not None and (files.directory / "tokenizer.json").is_file():
        tokenizer, own = load_tokenizer(str(files.directory), {})
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
        notes = tuple(own)
    for note in notes:
        say(note)
    if files is not None:
        _check_head(loaded, files)
        load_adapter(loaded.model, files)
    elif loaded.new_modules:
        say(
            f"the base has no weights for {', '.join(loaded.new_modules)}: drawn from seed {seed}, "
            "so the scores are those of chance"
        )
    model: PreTrainedModel = loaded.model.to(default_device())  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _base_names(section: ModelSection, files: AdapterFiles, labels: Sequence[str]) -> Sequence[str]:
    """The labels of an adapter's head that names none: those that the base was saved with, if they
    are as many and include the task's, else the task's."""
    config = load_config(section)
    own = head_labels(config)
    rows = {value.shape[0] for name, value in files.tensors.items() if ".lora_" not in name}
    fits = declares_head(config) and len(own) in rows
    return own if fits and find_labels(labels, own) is not None else labels


def _check_head(loaded: Pretrained, files: AdapterFiles) -> None:
    lacking = [
        name
        for name in loaded.new_modules
        if not any(key.startswith(f"{name}.") for key in files.tensors)
    ]
    if lacking:
        raise AdapterError(
            f"{files.directory}: neither the base nor the adapter has weights for "
            f"{', '.join(lacking)}"
        )


def load_for_generation(
    name_or_path: str,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda text: print(text, file=sys.stderr),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model on its device, with an adapter if one is named, and the tokenizer (the
    adapter's own where it has one). ``dtype`` is by default that of the adapter's training, else
    the checkpoint's.

    Raises ModelError and AdapterError.
    """
    files = read_adapter(adapter, say) if adapter is not None else None
    if files is not None and files.classifies:
        raise AdapterError(f"{files.directory}: the adapter classifies; it generates no text")
    section = ModelSection(
        name_or_path=name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    trained = (files.sidecar or {}).get("base_dtype") if files else None
    chosen = (
        dtype_name(dtype, "--dtype")
        or trained
        or dtype_name(load_config(section).dtype, name_or_path)
    )
    device = default_device()
    if chosen == "float16" and device.type == "cpu":
        say("float16 on the CPU: loaded in float32")
        chosen = "float32"
    section = section.model_copy(update={"dtype": chosen or "float32"})
    return _load_with(section, "causal", None, files, 0, say)
