"""Rules that involve several keys, and values with a syntax of their own."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.errors import Problem, RecipeError, UserError, did_you_mean
from lorakit.recipe.data_path import listed_sources
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.layer_ranges import parse_layers
from lorakit.recipe.sections import (
    SPLIT_ALIASES,
    AdapterSection,
    ModelSection,
    Recipe,
    Section,
    TaskSection,
    TrainSection,
    split_name_errors,
)
from lorakit.recipe.vocabulary import vocabulary_faults
from lorakit.recipe.yaml_source import YamlFile

METRIC_NAMES = (
    "accuracy",
    "f1",
    "f1_micro",
    "f1_macro",
    "subset_accuracy",
    "precision",
    "recall",
    "matthews_correlation",
    "pearson",
    "spearmanr",
    "lf_accuracy",
    "ex_accuracy",
    "bleu",
    "nist",
    "rouge_l",
    "cider",
    "exact_match",
    "loss",
    "perplexity",
)

#: Device files of the NVIDIA, ROCm and WSL drivers.
_DEVICES = ("nvidiactl", "nvidia0", "kfd", "dxg")
_TRUE = frozenset({"1", "true", "yes", "y", "on", "t"})


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe that was built in Python. Raises RecipeError with all problems."""
    method, method_faults = find_method(recipe.adapter.method)
    task, problems, task_faults = find_task(recipe.task.name)
    faults = [*method_faults, *task_faults]
    kind = None if task is None else task.kind
    faults += [*_wrong_config("adapter", recipe.adapter, method)]
    faults += [*_wrong_config("task", recipe.task, task)]
    faults += check_sections(recipe.model, recipe.adapter, recipe.task, recipe.train, kind)
    if faults or problems:
        located = [fault.locate(YamlFile("recipe", {})) for fault in faults]
        raise RecipeError([*problems, *located])


def _wrong_config(section: str, config: Section, owner: object) -> Iterator[Fault]:
    """A class of a user's file exists twice if the user's program imports the file."""
    expected: type[Section] = getattr(owner, "Config", Section)
    same_keys = type(config).model_fields.keys() == expected.model_fields.keys()
    if not (isinstance(config, expected) or same_keys):
        found = type(config).__name__
        yield Fault((section,), f"has type {found}", allowed=expected.__name__)


def check_sections(
    model: ModelSection | None,
    adapter: AdapterSection | None,
    task: TaskSection | None,
    train: TrainSection | None,
    task_kind: str | None,
) -> list[Fault]:
    """Return the faults between keys that are valid on their own; None skips a section.

    Invalid keys are replaced by their defaults here, so that one error does not hide others.
    """
    faults: list[Fault] = []
    if model is not None:
        faults += [*_dtype(model), *_new_head(model, task_kind)]
        faults += vocabulary_faults(model, task_kind)
    if adapter is not None:
        faults += [*_layers(adapter), *_targets(adapter)]
    if task is not None:
        faults += [*_packing(task, task_kind), *_splits(task), *_class_weights(task)]
        faults += _validation_share(task)
    if task is not None and train is not None:
        faults += [*_token_budget(task, train), *_streaming(task, train)]
        faults += [*_automatic_batch_size(task, train), *_label_smoothing(task, train)]
    if train is not None:
        faults += _one_of(train, "epochs", "max_steps")
        if task is None or not registry.is_user_task(str(getattr(task, "name", ""))):
            faults += _metric(train)  # a user task names its own metrics
        faults += [*_one_of(train, "warmup_ratio", "warmup_steps"), *_warmup(train)]
        faults += _deterministic(train)
    return faults


def find_method(name: str) -> tuple[Any, list[Fault]]:
    """Return the method called ``name``, or None with the faults of ``adapter.method``. A user's
    Python file is executed here."""
    path = ("adapter", "method")
    try:
        return registry.method(name), []
    except KeyError:
        files = "a method file: ./FILE.py:CLASS"
        return None, [_unknown_name(path, "method", name, registry.methods(), files)]
    except UserError as error:
        return None, [Fault(path, str(error).removeprefix(f"{name}: "), name, True)]


def find_task(name: str) -> tuple[Any, tuple[Problem, ...], list[Fault]]:
    """Return the task called ``name``, or None with the problems of its YAML file and the faults of
    ``task.name``. A user task's Python file is executed here."""
    path = ("task", "name")
    try:
        return registry.task(name), (), []
    except KeyError:
        files = "a task file: ./FILE.py:CLASS, ./FILE.yaml"
        return None, (), [_unknown_name(path, "task", name, registry.tasks(), files)]
    except RecipeError as error:
        return None, error.problems, []
    except UserError as error:
        return None, (), [Fault(path, str(error).removeprefix(f"{name}: "), name, True)]


def _unknown_name(
    path: tuple[str, str], kind: str, name: str, known: Iterable[str], files: str
) -> Fault:
    message = did_you_mean(f"unknown {kind}", name, known)
    return Fault(path, message, name, True, f"{', '.join(known)}, or {files}")


def _dtype(model: ModelSection) -> Iterator[Fault]:
    if model.dtype == "float16" and not has_accelerator():
        yield Fault(
            ("model", "dtype"),
            "float16 training requires an accelerator, and this machine has none",
            model.dtype,
            True,
            "bfloat16, float32",
        )


def _new_head(model: ModelSection, kind: str | None) -> Iterator[Fault]:
    if model.new_head and kind == "causal":
        message = "the task has no classification head"
        yield Fault(("model", "new_head"), message, True, True, "false")


def _layers(adapter: AdapterSection) -> Iterator[Fault]:
    if isinstance(adapter.layers, str):
        try:
            parse_layers(adapter.layers)
        except ValueError as error:
            allowed = 'null, a list of layer indices, or ranges such as "0-5,11"'
            yield Fault(("adapter", "layers"), str(error), adapter.layers, True, allowed)


def _targets(adapter: AdapterSection) -> Iterator[Fault]:
    given = [("target_modules", *item) for item in enumerate(adapter.target_modules or [])]
    given += [("target_parameters", *item) for item in enumerate(adapter.target_parameters)]
    for key, index, target in given:
        if not target.startswith("re:"):
            continue
        try:
            if not target[3:].strip():
                raise re.error("empty pattern")
            re.compile(target[3:])
        except (re.error, RecursionError, OverflowError) as error:
            path = ("adapter", key, index)
            message = f"invalid regular expression: {error}"
            yield Fault(path, message, target, True, "re: followed by a Python regular expression")


def _packing(task: TaskSection, kind: str | None) -> Iterator[Fault]:
    if task.packing and kind == "encoder":
        message = "an encoder task cannot pack rows"
        yield Fault(("task", "packing"), message, True, True, "false")


def _splits(task: TaskSection) -> Iterator[Fault]:
    if not isinstance(task.path, dict):
        return
    for message, allowed in split_name_errors(task.path):
        yield Fault(("task", "path"), message, allowed=allowed)
    for split, sources in task.path.items():
        weighted = [getattr(source, "weight", None) for source in listed_sources(sources)]
        if split != "train" and any(weighted):
            message = f"the sources of {split} have weights, which are for training"
            yield Fault(("task", "path"), message, allowed="sources without weight")


def _validation_share(task: TaskSection) -> Iterator[Fault]:
    share, path = task.validation_share, ("task", "validation_share")
    if share is None:
        return
    if task.streaming:
        message = "not supported with task.streaming, whose rows are read in order"
        yield Fault(path, message, share, True, "null")
    names = [name for name in SPLIT_ALIASES["validation"] if name in (task.path or ())]
    if isinstance(task.path, dict) and names:
        message = f"task.path has validation data already, as {names[0]!r}"
        yield Fault(path, message, share, True, "null, or no validation data in task.path")


def _token_budget(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    budget, path = train.max_tokens_per_batch, ("train", "max_tokens_per_batch")
    if budget is not None and budget < task.max_length:
        message = f"less than task.max_length = {task.max_length}, the tokens of the longest row"
        yield Fault(path, message, budget, True, f"null, or at least {task.max_length}")
    elif budget is not None and not train.group_by_length and not task.packing:
        message = "train.max_tokens_per_batch requires batches grouped by length"
        yield Fault(("train", "group_by_length"), message, False, True, "true")


def _streaming(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    if not task.streaming:
        return
    if train.max_steps is None:
        message = "required with task.streaming, because the number of rows is unknown"
        yield Fault(
            ("train", "max_steps"), message, None, True, "a number of steps, instead of epochs"
        )
    if train.max_tokens_per_batch is not None and not task.packing:
        path = ("train", "max_tokens_per_batch")
        message = "not supported with task.streaming, unless task.packing is true"
        yield Fault(path, message, train.max_tokens_per_batch, True, "null")


def _class_weights(task: TaskSection) -> Iterator[Fault]:
    if task.streaming and getattr(task, "class_weights", None) == "balanced":
        message = "not supported with task.streaming, because the number of rows is unknown"
        path = ("task", "class_weights")
        yield Fault(path, message, "balanced", True, "weights by name, or a list of weights")


def _label_smoothing(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    several = getattr(task, "multi_label", False) or getattr(task, "label_columns", None)
    if several and train.label_smoothing:
        message = "not supported for several labels per row"
        yield Fault(("train", "label_smoothing"), message, train.label_smoothing, True, "0.0")


def _automatic_batch_size(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    chosen, rows = train.per_device_batch_size == "auto", train.rows_per_step
    auto = "train.per_device_batch_size: auto"
    if not chosen and rows is not None:
        message = f"only allowed with {auto}; otherwise train.gradient_accumulation_steps decides"
        yield Fault(("train", "rows_per_step"), message, rows, True, "null")
    if not chosen:
        return
    if rows is not None and train.gradient_accumulation_steps != 1:
        path, value = ("train", "gradient_accumulation_steps"), train.gradient_accumulation_steps
        message = f"with {auto}, it follows from train.rows_per_step; set one of the two"
        yield Fault(path, message, value, True, "1, or leave it out")
    if train.max_tokens_per_batch is not None:
        path, value = ("train", "max_tokens_per_batch"), train.max_tokens_per_batch
        yield Fault(path, f"cannot be set together with {auto}", value, True, "null")
    path, allowed = ("train", "per_device_batch_size"), "a number"
    if task.streaming:
        message = "not supported with task.streaming, because the longest rows are unknown"
        yield Fault(path, message, "auto", True, allowed)
    if train.gradient_checkpointing == "offload":
        message = "not supported with train.gradient_checkpointing: offload"
        yield Fault(path, message, "auto", True, allowed)


def _one_of(train: TrainSection, first: str, second: str) -> Iterator[Fault]:
    if getattr(train, first) is not None and getattr(train, second) is not None:
        message = f"cannot be set together with train.{first}"
        allowed = "one of the two; remove the other, or set it to null"
        yield Fault(("train", second), message, getattr(train, second), True, allowed)


def _warmup(train: TrainSection) -> Iterator[Fault]:
    steps, total = train.warmup_steps, train.max_steps
    if steps is not None and total is not None and steps > total:
        message = f"more than train.max_steps = {total}"
        yield Fault(("train", "warmup_steps"), message, steps, True, f"0 to {total}")


def _deterministic(train: TrainSection) -> Iterator[Fault]:
    if train.deterministic and train.compile is True:
        message = (
            "not supported with train.deterministic, because the compiled code depends on the "
            "first batches, which differ when a run is resumed"
        )
        yield Fault(("train", "compile"), message, True, True, "auto, false")


def _metric(train: TrainSection) -> Iterator[Fault]:
    name = train.metric_for_best_model
    if name is not None and name not in METRIC_NAMES:
        message = did_you_mean("unknown metric", name, METRIC_NAMES)
        path = ("train", "metric_for_best_model")
        yield Fault(path, message, name, True, f"null, {', '.join(METRIC_NAMES)}")


def has_accelerator() -> bool:
    """Whether a CUDA, ROCm or Apple device is visible, determined without importing torch.

    An empty ``CUDA_VISIBLE_DEVICES`` or -1, and ``ACCELERATE_USE_CPU``, hide all devices.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return False
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev", name).exists() for name in _DEVICES)
