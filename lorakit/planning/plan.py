"""``lorakit plan``: what a run of a recipe will need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorakit.data.collate import Batch
from lorakit.data.encode import EncodedSplit
from lorakit.injection import InjectionReport
from lorakit.models.load import Pretrained
from lorakit.notes import Say, silent
from lorakit.planning.batches import RunBatches, run_batches
from lorakit.planning.devices import PlannedDevice, planned_device
from lorakit.planning.measure import Measurement, measure_steps
from lorakit.planning.memory import Memory, memory_of
from lorakit.planning.passes import PassCosts, plan_pass
from lorakit.planning.suggestions import Suggestion, suggestions
from lorakit.planning.time import seconds_per_step
from lorakit.planning.unloaded import Unloaded, adapt_unloaded, load_unloaded
from lorakit.recipe.check import check_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.batch_size import (
    batch_sizes,
    largest_that_fits,
    powers_of_two,
    trial_share,
)
from lorakit.training.batching import Batching, build_batching, split_step
from lorakit.training.build import build_schedule
from lorakit.training.execution import Execution, choose_execution

#: Decides only whether layers are compiled: as in a long run.
_UNKNOWN_STEPS = 10_000
#: From here on, a plan takes so long that it says what it does.
_MANY_PARAMETERS = 10**9


@dataclass(frozen=True)
class StepPlan:
    """A recipe's passes: what was injected, how they are executed, and what they cost. ``steps`` is
    None if the rows could not be read."""

    report: InjectionReport
    execution: Execution
    steps: int | None
    batches: RunBatches
    costs: PassCosts
    memory: Memory

    @property
    def mode(self) -> str:
        return self.execution.mode


@dataclass(frozen=True)
class RunPlan:
    """``step.memory`` is an estimate of that of a step on ``device``. ``seconds`` are those of all
    steps: from ``measured`` steps, or an estimate, or None if the device's speed is unknown."""

    step: StepPlan
    device: PlannedDevice
    fits: bool
    seconds: float | None
    measured: Measurement | None = None
    suggestions: list[Suggestion] = field(default_factory=list)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a forward and backward pass for a token."""
        return self.step.costs.flops / self.step.costs.tokens

    def to_json(self) -> dict[str, Any]:
        """The plan as ``lorakit plan --json`` prints it."""
        report = self.step.report
        return {
            "parameters": {
                "trainable": report.trainable_parameters,
                "total": report.total_parameters,
            },
            "steps": self.step.steps,
            "tokens_per_epoch": self.step.batches.tokens_per_epoch,
            "memory_bytes": self.step.memory.to_json(),
            "device_memory_bytes": self.device.memory_bytes,
            "fits": self.fits,
            "seconds": self.seconds,
            "flops_per_token": self.flops_per_token,
            "suggestions": [
                {"set": s.set, "peak_bytes": s.peak_bytes, "fits": s.fits} for s in self.suggestions
            ],
        }


def plan(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    device_memory: str | int | None = None,
    measure: bool = False,
    say: Say = silent,
) -> RunPlan:
    """Plan the run that ``recipe`` describes on this machine's device, on a ``gpu`` such as h100,
    or on a GPU with this much ``device_memory``, such as 80GB.

    The data is read and tokenized; of the model, only the configuration is read, unless
    ``measure`` times the first steps on this machine's device. Raises UserError if recipe, data and
    model do not fit together.
    """
    check_recipe(recipe)
    device = planned_device(gpu, device_memory)
    planner = _Planner(load_unloaded(recipe, say), device, say)
    recipe, step = planner.with_batch_size(recipe)
    fits = step.memory.peak <= device.usable_bytes
    if not fits:
        say("the run does not fit: planning it with other settings")
    found = (
        []
        if fits
        else suggestions(
            recipe,
            step.memory.peak,
            device.usable_bytes,
            device.device.type,
            planner.peak_with(recipe),
        )
    )
    if measure:
        measured = measure_steps(recipe, silent)
        total = measured.seconds(step.steps or 0, step.batches.tokens_per_step)
        return RunPlan(step, device, fits, total, measured, found)
    fp8 = recipe.model.base_precision == "fp8"
    each = seconds_per_step(step.costs, step.batches, step.mode, fp8, device)
    seconds = None if each is None or step.steps is None else step.steps * each
    return RunPlan(step, device, fits, seconds, None, found)


class _Planner:
    """Plans steps of recipes with other values of some keys, on the same data."""

    def __init__(self, unloaded: Unloaded, device: PlannedDevice, say: Say) -> None:
        self._unloaded, self._device = unloaded, device
        self._notes = self._say = say
        self._loaded: Pretrained | None = unloaded.inputs.loaded

    def step(self, recipe: Recipe, longest: int | None = None) -> StepPlan:
        """Plan ``recipe``, with rows cut to ``longest`` tokens."""
        device, inputs = self._device.device, self._unloaded.inputs
        loaded, self._loaded = self._loaded, None
        inputs = replace(inputs, loaded=loaded or self._unloaded.fresh(recipe))
        prepared = adapt_unloaded(recipe, inputs, self._say)
        if prepared.report.total_parameters >= _MANY_PARAMETERS:
            self._say("planning a step without loading weights; this can take a minute")
        self._say = silent
        batching = build_batching(prepared, device)
        steps = self._steps(prepared.recipe, batching)
        execution = choose_execution(prepared, device, steps or _UNKNOWN_STEPS)
        found: list[RunBatches] = []

        def largest(varlen: bool) -> Batch:
            found.append(run_batches(prepared, batching, device, execution, varlen, longest))
            return found[0].largest

        costs = plan_pass(prepared, device, execution, largest)
        memory = memory_of(prepared, device, costs, execution.mode, steps or _UNKNOWN_STEPS)
        batches = found[0]
        if self._unloaded.is_assumed:
            batches = replace(batches, tokens_per_epoch=None, tokens_per_step=None)
        return StepPlan(prepared.report, execution, steps, batches, costs, memory)

    def _steps(self, recipe: Recipe, batching: Batching) -> int | None:
        """The steps of the run; None if that depends on rows that could not be read."""
        if self._unloaded.is_assumed:
            return recipe.train.max_steps
        return build_schedule(recipe, batching.steps).total_steps

    def peak_with(self, recipe: Recipe) -> Callable[[dict[str, Any]], int]:
        """Return what plans ``recipe`` with other values of keys."""

        def peak(changes: dict[str, Any]) -> int:
            longest = changes.get("task.max_length")
            return self.step(changed(recipe, changes), longest).memory.peak

        return peak

    def with_batch_size(self, recipe: Recipe) -> tuple[Recipe, StepPlan]:
        """Replace ``per_device_batch_size: auto`` by the largest size that fits, or 1; and plan."""
        if recipe.train.per_device_batch_size != "auto":
            return recipe, self.step(recipe)
        rows = recipe.train.rows_per_step
        train = self._unloaded.inputs.encoded.train
        count = len(train) if isinstance(train, EncodedSplit) else 1
        per_step = recipe.train.gradient_accumulation_steps
        sizes = batch_sizes(rows, 1) if rows else powers_of_two(count // per_step)

        steps: dict[int, StepPlan] = {}

        def trial(size: int) -> int:
            steps[size] = self.step(split_step(recipe, size, 1))
            peak = steps[size].memory.peak
            if peak > self._device.usable_bytes * trial_share(steps[size].execution):
                raise torch.OutOfMemoryError
            return peak

        found = largest_that_fits(sizes, trial)
        size = found.per_device_batch_size if found else 1
        self._notes(
            f"train.per_device_batch_size = {size}: the largest expected to fit"
            if found
            else "train.per_device_batch_size: even 1 is not expected to fit"
        )
        chosen = split_step(recipe, size, 1)
        return chosen, steps.get(size) or self.step(chosen)


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """``recipe`` with other values, by ``section.key``."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values)
            for name, values in sections.items()
        }
    )
