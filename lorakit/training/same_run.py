"""Whether a run that resumes is the one that started: its recipe, code, data and steps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import registry
from lorakit.data.stream import have_same_head
from lorakit.distributed.group import rank_and_world_size
from lorakit.errors import UserError, shown
from lorakit.methods.base import Method
from lorakit.notes import Say
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import Recipe
from lorakit.recipe.yaml_source import read_yaml
from lorakit.training.batching import split_step, step_size
from lorakit.training.run_json import read_run
from lorakit.user_code import code_identity, is_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Keys that a resumed run may change: they do not affect its steps.
CHANGEABLE = {
    "train.output_dir",
    "train.log_every_steps",
    "train.save_every_steps",
    "train.save_total_limit",
    "train.trackers",
    # An evaluation may not have fit.
    "train.per_device_eval_batch_size",
    "task.generation_batch_size",
}
#: Keys that ``length`` checks.
_LENGTH = {"train.epochs", "train.max_steps"}
#: Keys that together decide what a step trains on.
_BATCH = {"train.per_device_batch_size", "train.gradient_accumulation_steps"}
#: Keys of the task whose defaults are reduced to what the model supports.
_FITTED = {"max_length", "max_new_tokens"}


def check_same_recipe(
    recipe: Recipe, output_dir: Path, prepared: bool = False, processes: int | None = None
) -> None:
    """Raise UserError unless ``recipe`` describes the run that started in ``output_dir``. Its
    length may differ, which ``length.check_length`` checks, as may labels found in the data and, as
    long as the recipe is not ``prepared``, defaults that depend on the model. ``processes`` is how
    many wrote the checkpoint, in case that run.json is lost."""
    path = output_dir / "recipe.yaml"
    if not path.is_file():
        return
    _check_same_code(recipe, output_dir)
    _check_same_files(recipe, path)
    started, recipe = load_recipe(path), as_started(recipe, output_dir)
    _check_same_steps(started, recipe, output_dir, processes)
    before, now = started.flat(), recipe.flat()
    later = set() if prepared else {f"task.{k}" for k in _FITTED - recipe.task.model_fields_set}
    changed = [
        key
        for key in sorted({*before, *now} - CHANGEABLE - _LENGTH - _BATCH - later)
        if not _are_same(before.get(key), now.get(key))
        and not (key == "task.labels" and now.get(key) is None)
    ]
    if changed:
        listed = "; ".join(
            f"{k}: was {shown(before.get(k))}, now {shown(now.get(k))}" for k in changed
        )
        raise UserError(f"--resume: the recipe differs from {path}: {listed}")


def has_other_length(recipe: Recipe, output_dir: Path) -> bool:
    """Whether the run in ``output_dir`` was given another length."""
    path = output_dir / "recipe.yaml"
    if not path.is_file():
        return False
    before, now = load_recipe(path).flat(), recipe.flat()
    return any(before[key] != now[key] for key in _LENGTH)


def as_started(recipe: Recipe, output_dir: Path) -> Recipe:
    """Return ``recipe`` with what the run in ``output_dir`` determined when it started: the batch
    size that ``auto`` chose, and keys that ``adapter.init_from`` set."""
    return with_started_batch_size(_with_started_adapter(recipe, output_dir), output_dir)


def _with_started_adapter(recipe: Recipe, output_dir: Path) -> Recipe:
    path, adapter = output_dir / "recipe.yaml", recipe.adapter
    if adapter.init_from is None or not path.is_file():
        return recipe
    started = load_recipe(path).adapter
    if started.init_from is None or type(started) is not type(adapter):
        return recipe
    given = {key: getattr(adapter, key) for key in adapter.model_fields_set}
    return recipe.model_copy(update={"adapter": started.model_copy(update=given)})


def with_started_batch_size(recipe: Recipe, output_dir: Path) -> Recipe:
    """Return ``recipe`` with the batch size that ``auto`` chose for the run in ``output_dir``, if
    the processes can split a step into such batches."""
    path = output_dir / "recipe.yaml"
    if recipe.train.per_device_batch_size != "auto" or not path.is_file():
        return recipe
    size, processes = load_recipe(path).train.per_device_batch_size, rank_and_world_size()[1]
    if not isinstance(size, int) or (recipe.train.rows_per_step or 0) % (size * processes):
        return recipe
    return split_step(recipe, size, processes)


def _check_same_steps(
    before: Recipe, now: Recipe, output_dir: Path, processes_before: int | None
) -> None:
    """Raise UserError unless the steps of the run in ``output_dir`` have the same rows as those of
    this run; over how many processes and batches they are split may differ."""
    recorded = (read_run(output_dir).get("hardware") or {}).get("processes") or processes_before
    if recorded is None:
        return
    processes = recorded, rank_and_world_size()[1]
    if step_size(before, processes[0]) != step_size(now, processes[1]):
        then, this = (
            f"per_device_batch_size {recipe.train.per_device_batch_size} x "
            f"gradient_accumulation_steps {recipe.train.gradient_accumulation_steps} x "
            f"{count} process{'' if count == 1 else 'es'}"
            for recipe, count in zip((before, now), processes, strict=True)
        )
        raise UserError(
            f"--resume: rows per step differ from the run in {output_dir}: was {then}, now {this}; "
            "allowed: the same product"
        )


def _check_same_files(recipe: Recipe, stored: Path) -> None:
    """Raise UserError if loading the recipe in an output directory would run other Python files
    than those that ``recipe`` names."""
    written = read_yaml(stored).data
    for section, key in (("adapter", "method"), ("task", "name")):
        keys = written.get(section)
        before = keys.get(key) if isinstance(keys, dict) else None
        now = getattr(getattr(recipe, section), key)
        runs = isinstance(before, str) and (registry.is_user_task(before) or "${" in before)
        if runs and not _are_same(before, now):
            raise UserError(
                f"--resume: the recipe differs from {stored}: {section}.{key}: was "
                f"{shown(before)}, now {shown(now)}"
            )


def _check_same_code(recipe: Recipe, output_dir: Path) -> None:
    """Raise UserError if the code of a user's method is not that of the run in ``output_dir``."""
    method: Method = registry.method(recipe.adapter.method)
    before = read_run(output_dir).get("method_digest")
    if None not in (before, method.digest) and before != method.digest:
        raise UserError(
            f"--resume: the code of {method.name} has changed since the run in {output_dir} "
            f"started; restore it, or choose another train.output_dir for a new run"
        )


def _are_same(before: object, now: object) -> bool:
    """Whether two values of a key are equal, or name the same class of the same file."""
    if isinstance(before, str) and isinstance(now, str) and is_code(before) and is_code(now):
        return code_identity(before) == code_identity(now)
    return before == now


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Identify the chat template, or the named templates; None for a tokenizer without one."""
    if not tokenizer.chat_template:
        return None
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()


def check_same_chat_template(tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Raise UserError if the chat template is not that of the run in ``output_dir``."""
    before = read_run(output_dir).get("chat_template_digest")
    if before not in (None, chat_template_digest(tokenizer)):
        raise UserError(
            f"--resume: the chat template has changed since the run in {output_dir} started; "
            "restore it, or choose another train.output_dir for a new run"
        )


def check_same_data(data: dict[str, Any], checkpoint: Path, say: Say) -> int:
    """Raise UserError if the rows are not those of the run that wrote ``checkpoint``.

    If a bad row of a stream ended the run, it may continue with corrected files, which begin with
    the same bytes but differ in size. Return the number of rows that these need to have, or 0 if
    nothing has changed.
    """
    run = read_run(checkpoint.parent.parent)
    before, rows = run.get("data") or {}, 0
    for split in before.keys() | data.keys() if before else ():
        then, now = ((of.get(split) or {}).get("fingerprint") for of in (before, data))
        if then != now:
            source = (data.get(split) or before[split])["source"]
            if not (run.get("bad_row") and have_same_head(then, now)):
                raise UserError(
                    f"--resume: {source}: the {split} data has changed since the run started"
                )
            say(f"{source}: changed since a bad row ended the run; earlier rows are not checked")
            rows = int((before.get(split) or {}).get("rows_read") or 0)
        tokens = [(of.get(split) or {}).get("tokens") for of in (before, data)]
        if then == now and None not in tokens and tokens[0] != tokens[1]:
            raise UserError(
                f"--resume: {data[split]['source']}: the {split} data has {tokens[1]:,} tokens, "
                f"but had {tokens[0]:,} when the run started: the tokenizer, the chat template or "
                "lorakit itself has changed; start a new run"
            )
    return rows
