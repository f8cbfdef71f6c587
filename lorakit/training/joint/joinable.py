"""Which recipes can be trained together over one base; torch is not imported for built-in
methods."""

from __future__ import annotations

from lorakit import registry
from lorakit.errors import shown
from lorakit.methods.base import Method
from lorakit.recipe.sections import Recipe
from lorakit.tasks.base import Task
from lorakit.tasks.classification import LabelledTask
from lorakit.tasks.token_classification import TokenClassification

#: How the shared passes are computed.
_SHARED = ("gradient_checkpointing", "kernels", "deterministic")


def can_join(a: Recipe, b: Recipe) -> str | None:
    """None if ``a`` and ``b`` can share a base and a batch, or else the reason in one short line.

    Both must name the same base and the same kind of task. Everything else may differ: the method,
    its ranks and targets, the rows, and all settings of the optimizer.
    """
    for recipe in (a, b):
        if reason := _cannot_join(recipe):
            return reason
    for key in type(a.model).model_fields:
        if key != "new_head" and getattr(a.model, key) != getattr(b.model, key):
            return _differs(f"model.{key}", getattr(a.model, key), getattr(b.model, key))
    kinds = [_kind(recipe) for recipe in (a, b)]
    if kinds[0] != kinds[1] and a.task.name == b.task.name:
        return "task.multi_label differs"
    if kinds[0] != kinds[1]:
        return _differs("task.name", a.task.name, b.task.name)
    if a.task.packing != b.task.packing:
        return _differs("task.packing", a.task.packing, b.task.packing)
    for key in _SHARED:
        if getattr(a.train, key) != getattr(b.train, key):
            return _differs(f"train.{key}", getattr(a.train, key), getattr(b.train, key))
    return None


def _cannot_join(recipe: Recipe) -> str | None:
    """Why the recipe must be trained alone."""
    method: Method = registry.method(recipe.adapter.method)
    train, model = recipe.train, recipe.model
    if not method.kinds:
        return f"adapter.method = {method.name} trains the base"
    if not method.joins:
        return f"adapter.method = {method.name} computes updates as large as the base for each run"
    if recipe.adapter.init_from is not None:
        return "adapter.init_from starts from another adapter"
    if model.add_tokens or model.chat_template is not None:
        key = "add_tokens" if model.add_tokens else "chat_template"
        return f"model.{key} changes the vocabulary of each run"
    if recipe.adapter.target_parameters or "experts" in (recipe.adapter.target_modules or ()):
        return "adapter adapts parameters of a module, such as experts"
    if model.base_precision is not None:
        return f"model.base_precision = {model.base_precision} quantizes the base of each run"
    if model.dtype == "float16":
        return "model.dtype = float16 scales the loss of each run"
    if train.compile is True:
        return "train.compile = true compiles the model of each run"
    if train.gradient_checkpointing == "offload":
        return "train.gradient_checkpointing = offload"
    if train.per_device_batch_size == "auto":
        return "train.per_device_batch_size = auto measures the memory of one run"
    return None


def _kind(recipe: Recipe) -> tuple[str, str]:
    """The kind of model, and of labels."""
    task = _task(recipe)
    if isinstance(task, TokenClassification):
        return task.kind, "of words"
    several = isinstance(task, LabelledTask) and task.labelling(recipe.task).several
    return task.kind, "several" if several else "one"


def _task(recipe: Recipe) -> Task:
    task: Task = registry.task(recipe.task.name)
    return task


def _differs(key: str, one: object, other: object) -> str:
    return f"{key} differs: {shown(one)} and {shown(other)}"
