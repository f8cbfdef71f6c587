"""``lorakit plan --measure``: the time and memory of a run's first steps on this device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lorakit.notes import Say
from lorakit.recipe.sections import Recipe
from lorakit.training.deterministic import deterministic_kernels
from lorakit.training.record import peak_memory_bytes
from lorakit.training.run import start_unwritten

#: Steps in which layers are compiled or graphs captured, and those that are timed.
_FIRST_STEPS, _TIMED_STEPS = 3, 8


@dataclass(frozen=True)
class Measurement:
    """``tokens_per_second`` and ``seconds_per_step`` are those of ``steps`` steps, without padding;
    ``first_seconds`` is what the ``first_steps`` before them took."""

    first_steps: int
    first_seconds: float
    steps: int
    seconds_per_step: float
    tokens_per_second: float
    peak_memory_bytes: int

    def seconds(self, total_steps: int, tokens_per_step: float | None) -> float:
        """The time of all steps of a run, which have so many tokens on average."""
        remaining = max(0, total_steps - self.first_steps)
        if tokens_per_step is None:
            return self.first_seconds + remaining * self.seconds_per_step
        return self.first_seconds + remaining * tokens_per_step / self.tokens_per_second


def measure_steps(recipe: Recipe, say: Say) -> Measurement:
    """Take the first steps of a run, and write nothing. Raises UserError as a run does, and
    TrainingError if the device has too little memory."""
    with deterministic_kernels(recipe.train.deterministic):
        run = start_unwritten(recipe, say)
        total = run.schedule.total_steps
        timed = max(1, min(_TIMED_STEPS, total - _FIRST_STEPS))
        first = min(_FIRST_STEPS, total - timed)
        times, tokens = [], []
        for number in range(first + timed):
            began = time.perf_counter()
            loaded = run.loader.take(number)
            run.step(loaded)
            _wait(run.strategy.device)
            times.append(time.perf_counter() - began)
            tokens.append(loaded.token_count)
    seconds = sum(times[first:])
    return Measurement(
        first_steps=first,
        first_seconds=sum(times[:first]),
        steps=timed,
        seconds_per_step=seconds / timed,
        tokens_per_second=sum(tokens[first:]) / seconds,
        peak_memory_bytes=peak_memory_bytes(run.strategy.device),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
