"""Evaluate an adapter or base model on a recipe's task, or load it to generate text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import registry
from lorakit.adapters.load import find_model
from lorakit.adapters.peft.method import run_method_file
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.data.examples import Problem
from lorakit.distributed.group import init_process_group, is_main
from lorakit.errors import AdapterError, ModelError, UserError
from lorakit.evaluation.evaluate import evaluate_model
from lorakit.evaluation.progress import OnPhase
from lorakit.host.openmp import yield_cores
from lorakit.models.fast_operators import use_operators_of_training
from lorakit.models.heads import declares_head, find_labels, head_labels
from lorakit.models.hub import load_config, load_tokenizer
from lorakit.models.kinds import Kind
from lorakit.models.load import Pretrained, default_device, load_pretrained
from lorakit.models.window import fit_max_length
from lorakit.notes import Say, to_stderr
from lorakit.pipeline.encoding import encode_eval_data
from lorakit.pipeline.predictions import SplitEvaluation
from lorakit.pipeline.task_data import load_task_data
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.token_classification import TokenClassification


def evaluate(
    recipe: Recipe,
    adapter: str | Path | None = None,
    *,
    base: bool = False,
    split: str | None = None,
    limit: int | None = None,
    on_progress: OnPhase | None = None,
) -> dict[str, float]:
    """Evaluate an adapter, or with ``base`` the base model, on ``recipe``'s task; return metrics.

    ``adapter`` is a directory in PEFT's format and defaults to the one that training the recipe
    writes. ``split`` and ``limit`` (the first N rows) override the task and the recipe.
    ``on_progress`` receives the phase ("loss", "generated" or "predicted"), the rows done and the
    total. Under ``torchrun`` or ``accelerate launch`` the processes share the rows, and each
    returns the same metrics. Notes go to stderr.

    Raises UserError for missing or mismatched inputs, and EvaluationError for a metric that is not
    finite.
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
    say: Say = to_stderr,
) -> SplitEvaluation:
    """Evaluate like ``evaluate``, and return the predictions too. Notes go to ``say``."""
    if base and adapter is not None:
        raise UserError(f"evaluate: base=True and adapter={str(adapter)!r}; allowed: one of them")
    init_process_group()
    task: Task = registry.task(recipe.task.name)
    task.check_requirements(recipe.task)
    files = None if base else _read_task_adapter(recipe, adapter, task, say)
    data = load_task_data(
        recipe, split, limit=limit, trained_labels=_trained_labels(files), say=say
    )
    if files is not None:
        _check_labels(files, data.labels)
    seed = recipe.train.seed
    model, tokenizer = load_adapted(
        recipe.model, data.task.kind, data.labels, files, seed, say, data.problem
    )
    if recipe.train.kernels == "auto" and recipe.train.compile is not True:
        use_operators_of_training(model)
    data = replace(data, config=fit_max_length(model, data.config, say))
    result = evaluate_model(
        model,
        tokenizer,
        encode_eval_data(data, model, tokenizer, say, write_cache=is_main()),
        batch_size=recipe.eval_batch_size,
        seed=seed,
        on_progress=on_progress,
    )
    return SplitEvaluation(
        task=data.config.name,
        split=data.split.name,
        examples=len(data.split),
        metrics=result.metrics,
        predictions=result.predictions,
    )


def load_for_generation(
    name_or_path: str,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    method: str | PathLike[str] | None = None,
    say: Say = to_stderr,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal model onto its device, with an adapter if one is given, and the tokenizer.

    ``name_or_path`` may also be an adapter directory, which names its base.
    The adapter's tokenizer is used if it has one. ``dtype`` defaults to the one that the adapter
    was trained with, or else to the checkpoint's. ``method`` is the ``FILE.py:CLASS`` of the user
    method that trained the adapter; its code is run. Raises ModelError and AdapterError.
    """
    run_method_file(method)
    found = find_model(
        name_or_path, adapter, revision=revision, trust_remote_code=trust_remote_code, say=say
    )
    if found.classifies():
        what = "the adapter of a classifier" if found.files else "a classifier"
        raise ModelError(
            f"{found.directory}: {what} cannot generate text; hint: use lorakit predict"
        )
    chosen = found.dtype_on(default_device(), dtype, say) or "float32"
    section = found.section.model_copy(update={"dtype": chosen})
    return load_adapted(section, "causal", None, found.files, 0, say)


def load_adapted(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None,
    files: AdapterFiles | None,
    seed: int,
    say: Say,
    problem: Problem | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base onto its device, with the adapter of ``files``, in evaluation mode.

    The tokenizer is the adapter's if it has one. Without an adapter, a classification head that the
    base lacks is randomly initialized from ``seed``, which is reported to ``say``. Raises
    AdapterError if the adapter does not fit the base.
    """
    brings_head = files is not None and files.brings_head
    if files is not None and brings_head and labels is not None:
        labels = _saved_head_labels(files) or _base_head_labels(section, files, labels)
    loaded = load_pretrained(
        section, kind, labels, seed=seed, head_given=brings_head, problem=problem
    )
    tokenizer, notes = loaded.tokenizer, loaded.notes
    if files is not None and (files.directory / "tokenizer.json").is_file():
        tokenizer, adapter_notes = load_tokenizer(str(files.directory), {})
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
        notes = tuple(adapter_notes)
    for note in notes:
        say(note)
    if files is not None:
        _check_new_modules(loaded, files)
        load_adapter(loaded.model, files)
    elif loaded.new_modules:
        say(
            f"the base has no weights for {', '.join(loaded.new_modules)}: they are initialized "
            f"at random from seed {seed}, so expect scores at chance level"
        )
    model: PreTrainedModel = loaded.model.to(default_device())  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _read_task_adapter(
    recipe: Recipe, adapter: str | Path | None, task: Task, say: Say
) -> AdapterFiles:
    """Read the adapter to evaluate: the given one, or the one that training ``recipe`` writes.

    Raises AdapterError if there is none, or if it was trained for the other kind of task.
    """
    directory = Path(adapter) if adapter is not None else Path(recipe.train.output_dir) / "adapter"
    if adapter is None and not directory.exists():
        raise AdapterError(
            f"{directory}: no such adapter directory; train the recipe first, name an adapter with "
            "--adapter, or evaluate the base model with --base"
        )
    files = read_adapter(directory, say, "set adapter.method to FILE.py:CLASS in the recipe")
    wanted = (task.kind == "encoder", isinstance(task, TokenClassification))
    if (files.classifies, files.is_token_classifier) != wanted:
        made_for = "classification" if files.classifies else "causal language models"
        if files.is_token_classifier:
            made_for = "token classification"
        raise AdapterError(
            f"{directory}: the adapter is for {made_for}, but the task {recipe.task.name} is not"
        )
    return files


def _trained_labels(files: AdapterFiles | None) -> list[str] | None:
    """Return the class names the adapter was trained with, in the task's order, if known."""
    labels = (files.sidecar or {}).get("labels") if files else None
    return list(labels) if labels else _saved_head_labels(files)


def _check_labels(files: AdapterFiles, labels: Sequence[str] | None) -> None:
    """Raise AdapterError if the adapter was trained with class names other than ``labels``."""
    trained = _trained_labels(files)
    if labels and trained and list(labels) != trained:
        raise AdapterError(
            f"{files.directory}: trained on the labels {', '.join(trained)}, "
            f"but the task has {', '.join(labels)}"
        )


def _saved_head_labels(files: AdapterFiles | None) -> list[str] | None:
    """Return the class names that lorakit saved with the adapter, in the order of its head."""
    names = (files.sidecar or {}).get("id2label") if files else None
    return [str(names[key]) for key in sorted(names, key=int)] if names else None


def _base_head_labels(
    section: ModelSection, files: AdapterFiles, labels: Sequence[str]
) -> Sequence[str]:
    """Return the labels of an adapter's head that was saved without class names.

    They are those of the base's head if it has as many outputs and all of the task's labels, or
    else the task's.
    """
    config = load_config(section)
    base_labels = head_labels(config)
    outputs = {value.shape[0] for name, value in files.tensors.items() if ".lora_" not in name}
    fits = declares_head(config) and len(base_labels) in outputs
    return base_labels if fits and find_labels(labels, base_labels) is not None else labels


def _check_new_modules(loaded: Pretrained, files: AdapterFiles) -> None:
    """Raise AdapterError if neither the base nor the adapter has a module's weights."""
    missing = [
        name
        for name in loaded.new_modules
        if not any(key.startswith(f"{name}.") for key in files.tensors)
    ]
    if missing:
        raise AdapterError(
            f"{files.directory}: neither the base nor the adapter has weights for "
            f"{', '.join(missing)}"
        )
