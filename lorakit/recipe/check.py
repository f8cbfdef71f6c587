"""Whether this machine has an accelerator, asked of the system and not of torch.

What no single key shows: contradictions between keys, and values with a form of their own.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import registry
from lorakit.errors import Problem, RecipeError, UserError, did_you_mean
from lorakit.recipe.diagnostics import Fault
from lorakit.recipe.sections import (
    KNOWN,
    AdapterSection,
    ModelSection,
    Recipe,
    TaskSection,
    TrainSection,
    named_twice,
    parse_layers,
)
from lorakit.recipe.yaml_source import Source

_DEVICES = ("nvidiactl", "nvidia0", "kfd", "dxg")
_TRUE = frozenset({"1", "true", "yes", "y", "on", "t"})


def has_accelerator() -> bool:
    """True with a CUDA, ROCm or Apple device that the environment does not hide.

    ``CUDA_VISIBLE_DEVICES`` empty or -1, and ``ACCELERATE_USE_CPU``, hide what there is.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return False
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev", name).exists() for name in _DEVICES)


METRIC_NAMES = (
    "accuracy",
    "f1",
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


def check_recipe(recipe: Recipe) -> None:
    """The checks for a recipe built in Python. Raises RecipeError with every problem."""
    methods = registry.methods()
    task, problems, task_faults = find_task(recipe.task.name)
    faults = [*unknown_method(recipe.adapter.method), *task_faults]
    kind = None if task is None else task.kind
    faults += [*_wrong_config("adapter", recipe.adapter, methods.get(recipe.adapter.method))]
    faults += [*_wrong_config("task", recipe.task, task)]
    faults += check_sections(recipe.model, recipe.adapter, recipe.task, recipe.train, kind)
    if faults or problems:
        located = [fault.locate(Source("recipe", {})) for fault in faults]
        raise RecipeError([*problems, *located])


def _wrong_config(section: str, config: object, owner: object) -> Iterator[Fault]:
    expected = getattr(owner, "Config", object)
    if not isinstance(config, expected):
        found = type(config).__name__
        yield Fault((section,), f"is a {found}", allowed=f"a {expected.__name__}")


def check_sections(
    model: ModelSection | None,
    adapter: AdapterSection | None,
    task: TaskSection | None,
    train: TrainSection | None,
    task_kind: str | None,
) -> list[Fault]:
    """The faults between keys that are valid each for itself; None leaves a section out.

    Keys that are invalid hold their defaults here, so that they do not hide the rest.
    """
    faults: list[Fault] = []
    if model is not None:
        faults += [*_dtype(model), *_new_head(model, task_kind)]
    if adapter is not None:
        faults += [*_layers(adapter), *_targets(adapter)]
    if task is not None:
        faults += [*_packing(task, task_kind), *_splits(task)]
    if task is not None and train is not None:
        faults += [*_token_budget(task, train), *_streaming(task, train)]
    if train is not None:
        faults += _one_of(train, "epochs", "max_steps")
        if task is None or not registry.is_user_task(str(getattr(task, "name", ""))):
            faults += _metric(train)  # a user task names its own metrics
        faults += [*_one_of(train, "warmup_ratio", "warmup_steps"), *_warmup(train)]
    return faults


def unknown_method(name: str) -> Iterator[Fault]:
    yield from _unknown_name(("adapter", "method"), "method", name, tuple(registry.methods()))


def find_task(name: str) -> tuple[Any, tuple[Problem, ...], list[Fault]]:
    """The task of ``task.name``, or None with what is wrong: the problems of a YAML file of the
    user's, and the faults of the name. A Python file that the name names is run here."""
    path = ("task", "name")
    try:
        return registry.task(name), (), []
    except KeyError:
        known = tuple(registry.tasks())
        (fault,) = _unknown_name(path, "task", name, known)
        own = f"{fault.allowed}, or your own file: ./FILE.py:CLASS, ./FILE.yaml"
        return None, (), [replace(fault, allowed=own)]
    except RecipeError as error:
        return None, error.problems, []
    except UserError as error:
        return None, (), [Fault(path, str(error), name, True)]


def _unknown_name(
    path: tuple[str, str], kind: str, name: str, known: tuple[str, ...]
) -> Iterator[Fault]:
    if name not in known:
        message = did_you_mean(f"unknown {kind}", name, known)
        yield Fault(path, message, name, True, ", ".join(known))


def _dtype(model: ModelSection) -> Iterator[Fault]:
    if model.dtype == "float16" and not has_accelerator():
        yield Fault(
            ("model", "dtype"),
            "this machine has no accelerator, and float16 does not train on a CPU",
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
            allowed = 'null, a list of layers from 0, or text like "0-5,11"'
            yield Fault(("adapter", "layers"), str(error), adapter.layers, True, allowed)


def _targets(adapter: AdapterSection) -> Iterator[Fault]:
    for index, target in enumerate(adapter.target_modules or []):
        if not target.startswith("re:"):
            continue
        try:
            if not target[3:].strip():
                raise re.error("it is empty")
            re.compile(target[3:])
        except (re.error, RecursionError, OverflowError) as error:
            path = ("adapter", "target_modules", index)
            message = f"not a regular expression: {error}"
            yield Fault(path, message, target, True, "re: and a regular expression of Python")


def _packing(task: TaskSection, kind: str | None) -> Iterator[Fault]:
    if task.packing and kind == "encoder":
        yield Fault(("task", "packing"), "an encoder cannot pack", True, True, "false")


def _splits(task: TaskSection) -> Iterator[Fault]:
    if not isinstance(task.path, dict):
        return
    for name in task.path:
        if name not in KNOWN:
            message = did_you_mean("unknown split", name, KNOWN)
            yield Fault(("task", "path"), message, name, True, ", ".join(KNOWN))
    for split, names in named_twice(task.path):
        message = f"{' and '.join(names)} both name the split {split!r}"
        yield Fault(("task", "path"), message, allowed="one of them")


def _token_budget(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    budget, path = train.max_tokens_per_batch, ("train", "max_tokens_per_batch")
    if budget is not None and budget < task.max_length:
        message = f"a row may have task.max_length = {task.max_length} tokens"
        yield Fault(path, message, budget, True, f"null, or {task.max_length} and more")
    elif budget is not None and not train.group_by_length and not task.packing:
        message = "train.max_tokens_per_batch makes batches of like lengths"
        yield Fault(("train", "group_by_length"), message, False, True, "true")


def _streaming(task: TaskSection, train: TrainSection) -> Iterator[Fault]:
    if not task.streaming:
        return
    if train.max_steps is None:
        message = "task.streaming reads rows whose number nobody knows: how long, in steps"
        yield Fault(("train", "max_steps"), message, None, True, "a number, in place of epochs")
    if train.max_tokens_per_batch is not None and not task.packing:
        path, message = ("train", "max_tokens_per_batch"), "task.streaming makes batches of rows"
        yield Fault(path, message, train.max_tokens_per_batch, True, "null")


def _one_of(train: TrainSection, first: str, second: str) -> Iterator[Fault]:
    if getattr(train, first) is not None and getattr(train, second) is not None:
        message = f"train.{first} is set too, and they contradict each other"
        allowed = f"one of {first} and {second}; the other null or left out"
        yield Fault(("train", second), message, getattr(train, second), True, allowed)


def _warmup(train: TrainSection) -> Iterator[Fault]:
    steps, total = train.warmup_steps, train.max_steps
    if steps is not None and total is not None and steps > total:
        message = f"longer than the run: train.max_steps = {total}"
        yield Fault(("train", "warmup_steps"), message, steps, True, f"0 to {total}")


def _metric(train: TrainSection) -> Iterator[Fault]:
    name = train.metric_for_best_model
    if name is not None and name not in METRIC_NAMES:
        message = did_you_mean("unknown metric", name, METRIC_NAMES)
        path = ("train", "metric_for_best_model")
        yield Fault(path, message, name, True, f"null, {', '.join(METRIC_NAMES)}")
