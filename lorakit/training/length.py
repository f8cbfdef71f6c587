"""The length of a run, and whether a run may resume with another one than it started with."""

from __future__ import annotations

from lorakit.data.plan import StepSource
from lorakit.errors import UserError, counted, shown
from lorakit.notes import Say
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import total_steps
from lorakit.training.learning_rate import resolve_warmup_steps, shares_of_peak
from lorakit.training.output_dir import Start
from lorakit.training.setup import Prepared


def check_length(prepared: Prepared, steps: StepSource, start: Start, say: Say) -> None:
    """Raise UserError unless the run at ``start`` can go on to the recipe's number of steps as if
    it had started with it: the steps so far are the same, with the same learning rates."""
    if start.checkpoint is None:
        return
    output_dir = start.checkpoint.parent.parent
    if not (output_dir / "recipe.yaml").is_file():
        return
    recipe, epoch = prepared.recipe, steps.steps_per_epoch
    started = load_recipe(output_dir / "recipe.yaml").train
    before, now = total_steps(started, epoch), total_steps(recipe.train, epoch)
    if before == now:
        return
    key = "max_steps" if recipe.train.max_steps is not None else "epochs"
    setting = f"train.{key} = {shown(getattr(recipe.train, key))}"
    if now < start.step:
        raise UserError(
            f"{setting}: {counted(now, 'step')}, but the run in {output_dir} has already taken "
            f"{start.step}; allowed: at least {counted(start.step, 'step')}"
        )
    if reason := _difference(prepared, before, now, start.step):
        raise UserError(
            f"{setting}: the run in {output_dir} was started with {counted(before, 'step')}; with "
            f"{now} it would have {reason}; hint: start a new run with adapter.init_from: "
            f"{output_dir / 'adapter'}"
        )
    say(f"continuing with {now} steps instead of {before}, as a run of {now} steps from the start")


def _difference(prepared: Prepared, before: int, now: int, step: int) -> str | None:
    """What would have been different up to ``step`` in a run of ``now`` steps; None if nothing."""
    recipe = prepared.recipe
    if prepared.method.depends_on_length():
        return f"had different {prepared.method.name} phases"
    rates = (_rates(recipe.train, total, step) for total in (before, now))
    differing = (at for at, (old, new) in enumerate(zip(*rates, strict=True), 1) if old != new)
    if (first := next(differing, None)) is None:
        return None
    warmups = [resolve_warmup_steps(recipe.train, total) for total in (before, now)]
    warmup = (
        "" if len(set(warmups)) == 1 else f", warmup {warmups[1]} steps instead of {warmups[0]}"
    )
    scheduler = recipe.train.lr_scheduler
    return f"used different learning rates from step {first} on ({scheduler}{warmup})"


def _rates(section: TrainSection, total: int, step: int) -> list[float]:
    """The learning rates of the first ``step`` steps and the next one, as shares of the peak."""
    return [*map(shares_of_peak(section, total), range(step + 1))]
