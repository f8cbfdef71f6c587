"""An engine and its batches, without a loop around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.distributed.build import build_strategy
from lorakit.recipe.sections import Recipe
from lorakit.training.batch_size import fit_batch_size
from lorakit.training.batching import StepLoader, build_batching
from lorakit.training.build import build_engine, build_loader, build_objective, build_schedule
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.execution import Execution, Mode, choose_execution
from lorakit.training.setup import Prepared, prepare


@dataclass
class Built:
    prepared: Prepared
    objective: Any
    engine: EagerEngine
    loader: StepLoader
    said: list[str]

    def take_steps(self, count: int = 1) -> list[StepResult]:
        """The next steps of the run."""
        first = self.engine.steps
        return [
            self.engine.step(self.loader.take(number).micro_batches)
            for number in range(first, first + count)
        ]


def built(recipe: Recipe, engine: Mode | None = None) -> Built:
    """The parts of a run; ``engine`` replaces the chosen engine, but not the shapes of batches."""
    said: list[str] = []
    strategy = build_strategy(recipe.model.dtype)
    prepared, tried = fit_batch_size(prepare(recipe, lambda text: None), strategy, said.append)
    steps = build_batching(prepared, strategy.device).steps
    total_steps = build_schedule(prepared.recipe, steps).total_steps
    execution = choose_execution(prepared, strategy.device, total_steps)
    objective = tried or build_objective(prepared, strategy, said.append)
    loader = build_loader(prepared, objective, steps, strategy.device, execution)
    execution = Execution(engine) if engine else execution
    chosen = build_engine(prepared, objective, strategy, total_steps, execution, said.append)
    return Built(prepared, objective, chosen, loader, said)
