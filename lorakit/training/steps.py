"""Runs as generators of their steps, so that several runs can take theirs together.

``drive`` takes the steps of a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from lorakit.training.batching import LoadedStep
from lorakit.training.engine import Engine, StepResult

T = TypeVar("T")


@dataclass(frozen=True)
class StepRequest:
    """A step that a loop wants to be taken. ``metrics`` are those of an evaluation after the last
    step; None if there was none."""

    engine: Engine
    loaded: LoadedStep
    metrics: dict[str, float] | None = None

    def take(self) -> StepResult:
        return self.engine.step(self.loaded.micro_batches, self.loaded.loss_count)


#: Yields the next step and receives its result, or None to stop early instead of taking it.
Steps = Generator[StepRequest, StepResult | None, T]


#: Gets the steps that a run has taken and its metrics, None if it has not just been evaluated.
StopAt = Callable[[int, dict[str, float] | None], bool]


def drive(steps: Steps[T], stop_at: StopAt | None = None) -> T:
    """Take all steps, and return what ``steps`` returns.

    ``stop_at`` is asked before the first step and after each evaluation but the last: true ends the
    run there, as early stopping does.
    """
    try:
        request, first = next(steps), True
        while True:
            asks = stop_at is not None and (first or request.metrics is not None)
            first = False
            if asks and stop_at is not None and stop_at(request.loaded.number, request.metrics):
                request = steps.send(None)
                continue
            try:
                result = request.take()
            except BaseException as error:
                request = steps.throw(error)
            else:
                request = steps.send(result)
    except StopIteration as end:
        value: T = end.value
        return value
