"""``lorakit plan``: what a run of a recipe will need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lorakit.data.collate import Batch
from lorakit.injection import InjectionReport
from lorakit.models.load import Pretrained
from lorakit.pipeline.task_data import Say
from lorakit.planning.batches import RunBatches, run_batches
from lorakit.planning.devices import PlannedDevice, planned_device
from lorakit.planning.measure import Measurement, measure_steps
from lorakit.planning.memory import Memory, memory_of
from lorakit.planning.passes import PassCosts, plan_pass
from lorakit.planning.suggestions import Suggestion, suggestions
from lorakit.planning.time import seconds_per_step
from lorakit.planning.unloaded import adapt_unloaded, load_unloaded
from lorakit.recipe.check import check_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import build_batching
from lorakit.training.build import build_schedule
from lorakit.training.execution import choose_execution
from lorakit.training.setup import Inputs

#: The share of a device's memory that a run can use: the rest is the driver's, and what is lost
#: between blocks.
USABLE = 0.95


@dataclass(frozen=True)
class StepPlan:
    """A recipe's passes: what was injected, how they are executed, and what they cost."""

    report: InjectionReport
    mode: str
    steps: int
    batches: RunBatches
    costs: PassCosts
    memory: Memory


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
    say: Say = lambda text: None,
) -> RunPlan:
    """Plan the run that ``recipe`` describes on this machine's device, on a ``gpu`` such as h100,
    or on a GPU with so much ``device_memory``, such as 80GB.

    The data is read and tokenized; of the model, only the configuration is read, unless
    ``measure`` times the first steps on this machine's device. Raises UserError if recipe, data and
    model do not fit together.
    """
    check_recipe(recipe)
    device = planned_device(gpu, device_memory)
    inputs, fresh = load_unloaded(recipe, say)
    planner = _Planner(recipe, inputs, fresh, device, say)
    step = planner.step({})
    usable = int(USABLE * device.memory_bytes)
    peak = step.memory.peak
    fits = peak <= usable
    found = (
        []
        if fits
        else suggestions(
            recipe, peak, usable, device.device.type, lambda c: planner.step(c).memory.peak
        )
    )
    if not measure:
        each = seconds_per_step(step.costs, step.batches, step.mode, device)
        seconds = None if each is None else step.steps * each
        return RunPlan(step, device, fits, seconds, None, found)
    measured = measure_steps(recipe, lambda note: None)
    total = measured.seconds(step.steps, step.batches.tokens_per_step)
    return RunPlan(step, device, fits, total, measured, found)


class _Planner:
    """Plans steps of a recipe with other values of keys, on the same data."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        fresh: Callable[[Recipe], Pretrained],
        device: PlannedDevice,
        say: Say,
    ) -> None:
        self._recipe, self._inputs, self._fresh = recipe, inputs, fresh
        self._device, self._say = device.device, say

    def step(self, changes: dict[str, Any]) -> StepPlan:
        """Plan with ``changes``, from ``section.key`` to values."""
        recipe, longest = changed(self._recipe, changes), changes.get("task.max_length")
        inputs = self._inputs
        if changes:
            inputs = replace(inputs, loaded=self._fresh(recipe))
        prepared = adapt_unloaded(recipe, inputs, (lambda _: None) if changes else self._say)
        batching = build_batching(prepared, self._device)
        steps = build_schedule(prepared.recipe, batching.steps).total_steps
        execution = choose_execution(prepared, self._device, steps)
        found: list[RunBatches] = []

        def largest(varlen: bool) -> Batch:
            batches = run_batches(prepared, batching, self._device, execution, varlen, longest)
            found.append(batches)
            return batches.largest

        costs = plan_pass(prepared, self._device, execution, largest)
        memory = memory_of(prepared, self._device, costs, steps)
        return StepPlan(prepared.report, execution.mode, steps, found[0], costs, memory)


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
