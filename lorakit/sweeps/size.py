"""How many parameters a member trains, and the rank with which it trains a given number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.adapters.start import read_start
from lorakit.anatomy import outermost
from lorakit.errors import UserError, shown
from lorakit.injection import InjectionReport, find_heads, inject
from lorakit.models.load import load_empty
from lorakit.notes import Say, silent
from lorakit.pipeline.task_data import load_training_data
from lorakit.recipe.sections import MAX_RANK, AdapterSection, Recipe
from lorakit.recipe.yaml_source import read_yaml
from lorakit.sweeps.load import Sweep, make_member
from lorakit.sweeps.members import Member
from lorakit.training.setup import load_task_model


class Sizes:
    """Counts trained parameters on models without values, each of which is made once."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[PreTrainedModel, list[str]]] = {}
        self._reports: dict[str, InjectionReport] = {}

    def count(self, recipe: Recipe, adapter: AdapterSection | None = None) -> int:
        """The parameters that ``recipe`` trains, with another ``adapter`` if it is given; a new
        classification head included. Raises UserError if recipe, data and model do not fit."""
        return self._report(recipe, adapter or recipe.adapter).trainable_parameters

    def largest_rank(self, recipe: Recipe) -> int:
        """The smaller dimension of the smallest target: a higher rank adds nothing."""
        modules = self._report(recipe, recipe.adapter).adapted_modules
        return min((MAX_RANK, *(min(module.shape) for module in modules)))

    def _report(self, recipe: Recipe, adapter: AdapterSection) -> InjectionReport:
        model, heads = self._model(recipe)
        key = f"{id(model)} {adapter.model_dump_json()}"
        if key not in self._reports:
            own = copy.deepcopy(model)
            if adapter.init_from is not None:
                start = read_start(own, recipe.model, adapter, heads, silent)
                adapter = start.config.model_copy(update={"init_from": None})
            if "init" in type(adapter).model_fields:  # some need the weights' values
                adapter = adapter.model_copy(update={"init": "default"})
            self._reports[key] = inject(own, adapter, outermost(heads))
        return self._reports[key]

    def _model(self, recipe: Recipe) -> tuple[PreTrainedModel, list[str]]:
        """The base without values, and the modules that are always trained."""
        key = f"{recipe.model.model_dump_json()} {recipe.task.model_dump_json()}"
        if key not in self._models:
            self._models[key] = _empty_model(recipe)
        return self._models[key]


def _empty_model(recipe: Recipe) -> tuple[PreTrainedModel, list[str]]:
    if registry.task(recipe.task.name).kind == "causal":
        return load_empty(recipe.model, "causal"), []
    data = load_training_data(recipe, silent)
    loaded = load_task_model(recipe, data)
    heads = dict.fromkeys([*find_heads(loaded.model), *loaded.new_modules])
    model: torch.nn.Module = loaded.model
    model.to("meta")
    return loaded.model, list(heads)


def with_budget(sweep: Sweep, sizes: Sizes, say: Say) -> Sweep:
    """Choose the rank of each member so that it trains as many parameters as the sweep's
    ``trainable_parameters``, as nearly as possible.

    The rank is ``adapter.r``, or ``adapter.target_r`` of AdaLoRA, whose budget is that of the end.
    Raises UserError for a member whose method has neither, or that trains fewer or more with every
    rank, and as ``Sizes.count`` does.
    """
    budget = sweep.section.trainable_parameters
    if budget is None:
        return sweep
    base = read_yaml(Path(sweep.section.recipe)).data
    members = []
    for member in sweep.members:
        key, r, count = _nearest_rank(member, budget, sizes)
        say(f"{member.name}: {key} = {r}: {count:,} parameters for a budget of {budget:,}")
        settings = {**member.set, key: r}
        members.append(make_member(sweep.section, base, member.name, settings))
    return replace(sweep, members=tuple(members))


def _nearest_rank(member: Member, budget: int, sizes: Sizes) -> tuple[str, int, int]:
    """The key of the rank, its value, and how many parameters are trained with it."""
    adapter = member.recipe.adapter
    fields = type(adapter).model_fields
    keys = [key for key in ("target_r", "init_r", "r") if key in fields]
    if not keys:
        raise UserError(
            f"trainable_parameters: member {member.name}: adapter.method = {shown(adapter.method)} "
            "has no rank to choose; allowed: null, or methods with the key r or target_r"
        )

    def count(r: int) -> int:
        changed = adapter.model_copy(update=dict.fromkeys(keys, r))
        return sizes.count(member.recipe, changed)

    most = sizes.largest_rank(member.recipe)
    if keys[0] == "target_r":  # init_r is 1.5 times as high
        most = max(1, 2 * most // 3)
    fewest, largest = count(1), count(most)
    if not fewest <= budget <= largest:
        raise UserError(
            f"trainable_parameters = {budget}: member {member.name} cannot train that "
            f"{'few' if budget < fewest else 'many'} parameters; allowed: {fewest} to {largest}, "
            f"with adapter.{keys[0]} from 1 to {most}"
        )
    r = nearest_rank(budget, count, most)
    return f"adapter.{keys[0]}", r, count(r)


def nearest_rank(budget: int, count: Callable[[int], Any], most: int = MAX_RANK) -> int:
    """The rank up to ``most`` whose ``count``, which grows with it, is nearest to ``budget``; of
    two equally near ones the lower."""
    below, above = 0, 1
    while above < most and count(above) < budget:
        if below and count(above) == count(below):  # it does not depend on the rank
            return 1
        below, above = above, min(2 * above, most)
    while above - below > 1:
        middle = (below + above) // 2
        if count(middle) < budget:
            below = middle
        else:
            above = middle
    if below == 0:
        return above
    return below if budget - count(below) <= abs(count(above) - budget) else above
