"""Load a base model to evaluate or to generate from, with or without an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import AdapterFiles, dtype_name, read_adapter, run_method_file
from lorakit.errors import AdapterError
from lorakit.models.heads import declares_head, find_labels, head_labels
from lorakit.models.hub import load_config, load_tokenizer
from lorakit.models.load import Kind, Pretrained, default_device, load_pretrained
from lorakit.recipe.sections import ModelSection, Recipe
from lorakit.tasks.base import Task

Say = Callable[[str], None]


def load_for_generation(
    name_or_path: str,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    method: str | None = None,
    say: Say = lambda text: print(text, file=sys.stderr),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal model onto its device, with an adapter if one is named, and the tokenizer.

    The adapter's own tokenizer is used if it has one. ``dtype`` defaults to the one the adapter was
    trained with, or else to the checkpoint's. ``method`` is the ``FILE.py:CLASS`` of the user's
    method that trained the adapter; its code is run. Raises ModelError and AdapterError.
    """
    run_method_file(method)
    files = read_adapter(adapter, say) if adapter is not None else None
    if files is not None and files.classifies:
        raise AdapterError(
            f"{files.directory}: the adapter is for classification and cannot generate text"
        )
    section = ModelSection(
        name_or_path=name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    trained = (files.sidecar or {}).get("base_dtype") if files else None
    chosen = (
        dtype_name(dtype, "--dtype")
        or trained
        or dtype_name(load_config(section).dtype, name_or_path)
    )
    if chosen == "float16" and default_device().type == "cpu":
        say("float16 is not supported on the CPU: loading the model in float32")
        chosen = "float32"
    section = section.model_copy(update={"dtype": chosen or "float32"})
    return load_adapted(section, "causal", None, files, 0, say)


def load_adapted(
    section: ModelSection,
    kind: Kind,
    labels: Sequence[str] | None,
    files: AdapterFiles | None,
    seed: int,
    say: Say,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base onto its device, with the adapter of ``files`` in place, in evaluation mode.

    The tokenizer is the adapter's if it has one. A classification head that neither has is drawn
    from ``seed``, which is said. Raises AdapterError if the adapter does not fit the base.
    """
    brings_head = files is not None and files.brings_head
    if files is not None and brings_head and labels is not None:
        labels = _saved_head_labels(files) or _base_head_labels(section, files, labels)
    loaded = load_pretrained(section, kind, labels, seed=seed, head_given=brings_head)
    tokenizer, notes = loaded.tokenizer, loaded.notes
    if files is not None and (files.directory / "tokenizer.json").is_file():
        tokenizer, own = load_tokenizer(str(files.directory), {})
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
        notes = tuple(own)
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


def read_task_adapter(
    recipe: Recipe, adapter: str | Path | None, task: Task, say: Say
) -> AdapterFiles:
    """Read the adapter to evaluate: the one named, or the one that training ``recipe`` writes.

    Raises AdapterError if there is none, or if it was trained for the other kind of task.
    """
    directory = Path(adapter) if adapter is not None else Path(recipe.train.output_dir) / "adapter"
    if adapter is None and not directory.exists():
        raise AdapterError(
            f"{directory}: no such adapter directory; train the recipe first, name an adapter with "
            "--adapter, or evaluate the base model with --base"
        )
    files = read_adapter(directory, say)
    if files.classifies != (task.kind == "encoder"):
        made_for = "classification" if files.classifies else "causal language models"
        raise AdapterError(
            f"{directory}: the adapter is for {made_for}, but the task {recipe.task.name} is not"
        )
    return files


def trained_labels(files: AdapterFiles | None) -> list[str] | None:
    """Return the class names the adapter was trained with, in the task's order, if known."""
    labels = (files.sidecar or {}).get("labels") if files else None
    return list(labels) if labels else _saved_head_labels(files)


def check_labels(files: AdapterFiles, labels: Sequence[str] | None) -> None:
    """Raise AdapterError if the adapter was trained with other class names than ``labels``."""
    trained = trained_labels(files)
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
    """Return the labels of an adapter's head that names none.

    They are the base's own if the base was saved as a classifier with as many outputs and knows all
    of the task's labels, or else the task's.
    """
    config = load_config(section)
    own = head_labels(config)
    outputs = {value.shape[0] for name, value in files.tensors.items() if ".lora_" not in name}
    fits = declares_head(config) and len(own) in outputs
    return own if fits and find_labels(labels, own) is not None else labels


def _check_new_modules(loaded: Pretrained, files: AdapterFiles) -> None:
    """Raise AdapterError if the adapter has no weights for a module that the base lacks."""
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
