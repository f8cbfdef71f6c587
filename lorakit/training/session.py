"""The part of a run that writes files: it trains, records and exports the adapter.

It is a generator of steps, like the loop in it, so that several runs can take theirs together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.distributed.group import is_main
from lorakit.distributed.processes import failures_reported, gather, run_on_main
from lorakit.distributed.strategy import Strategy
from lorakit.errors import Interrupted, TrainingError, UserError, WriteFailed
from lorakit.evaluation.evaluate import EvalData
from lorakit.io.atomic import writing
from lorakit.notes import Say
from lorakit.recipe.export import write_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.adapter_export import export_adapter
from lorakit.training.batching import Batching
from lorakit.training.build import build_schedule
from lorakit.training.checkpoint import (
    delete_after,
    readable_checkpoints,
    set_aside_after,
    skipped_line,
)
from lorakit.training.control import Schedule
from lorakit.training.deterministic import no_kernel_as_error
from lorakit.training.guard import Guard, advice_after_failure
from lorakit.training.loop import Loop
from lorakit.training.output_dir import (
    Start,
    exclusive_run,
    init_from_before,
    none_to_resume,
    rows_read_before,
)
from lorakit.training.prediction_samples import PREDICTIONS_JSON, write_predictions
from lorakit.training.ranks import rank_table
from lorakit.training.record import RunRecord, describe_hardware, new_record
from lorakit.training.same_run import chat_template_digest
from lorakit.training.setup import Prepared
from lorakit.training.steps import Steps
from lorakit.training.tracking import Display, MetricsFile, NoMetrics, Recorder, start_trackers

#: After so many evaluations without a better one, the end of a run mentions early stopping.
_MANY_EVALUATIONS = 5


@dataclass(frozen=True)
class RunResult:
    """``metrics`` are those of the final evaluation of the adapter in ``adapter_dir``, which is of
    ``best_step``; ``main_metric`` is the one to report first. Both are None without an evaluation.
    ``diverged`` tells whether the loss ended above where it started. ``seconds`` is the time of
    training and its evaluations over all resumes."""

    metrics: dict[str, float]
    adapter_dir: Path
    output_dir: Path
    steps: int
    diverged: bool = False
    seconds: float = 0.0
    main_metric: str | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Session:
    """A run that is ready to start. ``build`` returns its loop, given what records the run and,
    in the main process, the guard of its directory; ``display`` shows a run of so many steps that
    starts after some."""

    prepared: Prepared
    strategy: Strategy
    batching: Batching
    start: Start
    build: Callable[[Schedule, Recorder, Guard | None], Loop]
    display: Callable[[int, int], Display]
    say: Say

    def steps(self) -> Steps[RunResult]:
        """Train to the end in the output directory, which no other run may use meanwhile."""
        with (
            _exclusive(self.prepared.recipe, self.start) as output_dir,
            no_kernel_as_error(),  # within, since _exclusive must see a UserError
        ):
            return (yield from self._steps(output_dir))

    def _steps(self, output_dir: Path) -> Steps[RunResult]:
        prepared, recipe, say = self.prepared, self.prepared.recipe, self.say
        if is_main():
            with writing(output_dir / "recipe.yaml"):
                write_recipe(recipe, output_dir / "recipe.yaml")
        schedule = build_schedule(recipe, self.batching.steps)
        record = self._new_record()
        with (
            record.saved_to(output_dir / "run.json") if is_main() else nullcontext(),
            closing(self._open_recorder(output_dir, schedule)) as recorder,
            failures_reported(),
        ):
            guard = Guard(output_dir, record.process) if is_main() else None
            gather(None)  # building waits for all processes, also if one of them could not write
            loop = self.build(schedule, recorder, guard)
            try:
                _resume(loop, self.start, recipe, say)
                yield from loop.steps()
                with loop.clock.paused():
                    warning = loop.divergence()  # of the last weights, which may not be the best
                    record.diverged = warning is not None
                    self._say_notes(loop)
                    record.metrics = loop.finish()
                if record.metrics:
                    record.main_metric = _reported_metric(prepared)
            except Interrupted:
                record.bad_row = loop.loader.met_bad_row()
                raise
            finally:
                record.diverged |= loop.broken
                record.update(loop.progress, self.strategy.device)
                record.data["train"] |= loop.loader.rows_read()
            if ranks := loop.engine.ranks():
                record.set_ranks(ranks)
                say(rank_table(ranks))
            adapter_dir = output_dir / "adapter"
            with loop.clock.paused():
                run_on_main(lambda: _export(prepared, adapter_dir, record, guard, say))
                run_on_main(lambda: _save_predictions(output_dir, prepared.evaluation, loop, say))
        if warning:
            say(f"warning: {warning}")
        return RunResult(
            record.metrics, adapter_dir, output_dir, record.steps, record.diverged, record.seconds,
            record.main_metric, record.best_step,
        )  # fmt: skip

    def _new_record(self) -> RunRecord:
        prepared, strategy = self.prepared, self.strategy
        hardware = describe_hardware(strategy.device) | {"processes": strategy.share.world_size}
        train = prepared.recipe.train
        record = new_record(
            prepared.report, hardware, train.seed, prepared.data, prepared.method.digest
        )
        record.data["train"] |= rows_read_before(self.start)
        record.init_from = prepared.init_from or init_from_before(self.start)
        record.chat_template_digest = chat_template_digest(prepared.tokenizer)
        record.per_device_batch_size = train.units_per_batch
        return record

    def _open_recorder(self, output_dir: Path, schedule: Schedule) -> Recorder:
        start, recipe = self.start, self.prepared.recipe
        keep = start.snapshot.progress.metrics_lines if start.snapshot else 0
        if not is_main():
            return Recorder(NoMetrics(keep), Display(schedule.total_steps, quiet=True))
        return Recorder(
            MetricsFile(output_dir / "metrics.jsonl", keep),
            self.display(schedule.total_steps, start.step),
            start_trackers(recipe.train.trackers, output_dir, _flat_recipe(recipe)),
        )

    def _say_notes(self, loop: Loop) -> None:
        for note in self.batching.notes(self.prepared.recipe):
            self.say(note)
        best = loop.progress.best_step
        if best not in (0, loop.progress.step):
            self.say(f"the adapter is that of step {best}, which had the best evaluation")
        count = loop.progress.evaluations_without_gain
        if count >= _MANY_EVALUATIONS and not loop.best.patience:
            self.say(
                f"the last {count} evaluations brought no improvement; hint: "
                f"train.early_stopping_patience, such as {_MANY_EVALUATIONS}, ends such a run"
            )


def _reported_metric(prepared: Prepared) -> str:
    """The metric of the final evaluation to report first."""
    recipe = prepared.recipe
    chosen = recipe.train.metric_for_best_model
    return chosen or prepared.task.best_metric(recipe.task, final=True)


@contextmanager
def _exclusive(recipe: Recipe, start: Start) -> Iterator[Path]:
    """``exclusive_run`` in the main process, for which the others wait."""
    if not is_main():
        gather(None)
        yield Path(recipe.train.output_dir)
        return
    with exclusive_run(recipe, start) as output_dir:
        gather(None)
        yield output_dir


def _export(
    prepared: Prepared, adapter_dir: Path, record: RunRecord, guard: Guard | None, say: Say
) -> None:
    output_dir = adapter_dir.parent
    is_there = guard is None or guard.check()
    try:
        with writing(adapter_dir):
            export_adapter(prepared, adapter_dir, record, say)
    except UserError as error:  # of the base or another input, changed during the run
        advice = "; ".join(advice_after_failure(output_dir))
        raise TrainingError(f"{adapter_dir}: not written: {error}; {advice}") from error
    if not is_there:
        raise TrainingError(
            f"{output_dir} was deleted or renamed during the run; saved {adapter_dir}"
        )


def _save_predictions(output_dir: Path, data: EvalData | None, loop: Loop, say: Say) -> None:
    if data is None:
        return
    try:
        write_predictions(output_dir, data, loop.predictions, loop.progress.best_step)
    except WriteFailed:
        raise
    except Exception as error:  # of a user's task, perhaps; the run itself is complete
        say(f"warning: {PREDICTIONS_JSON}: not written: {type(error).__name__}: {error}")


def _resume(loop: Loop, start: Start, recipe: Recipe, say: Say) -> None:
    """Resume from ``start``, or with ``auto`` from an earlier checkpoint if it does not fit."""
    if start.checkpoint is None or start.snapshot is None:
        return
    resumed = start.checkpoint
    try:
        loop.resume(start.checkpoint, start.snapshot)
    except UserError as error:
        if start.is_named:
            raise
        resumed = _resume_earlier(loop, error, start.step, say)
    if is_main():
        later = delete_after if start.is_named else set_aside_after
        later(loop.checkpoint_dir, loop.progress.step)
    say(f"resumed from {resumed}")
    if recipe.task.streaming:
        say("streaming: skipping the rows that the run has already trained on")


def _resume_earlier(loop: Loop, error: UserError, step: int, say: Say) -> Path:
    say(skipped_line(error))
    earlier = readable_checkpoints(loop.checkpoint_dir, say, before=step)
    while (found := run_on_main(lambda: next(earlier, None))) is not None:
        try:
            loop.resume(*found)
        except UserError as mismatch:
            say(skipped_line(mismatch))
        else:
            return found[0]
    raise none_to_resume(loop.checkpoint_dir) from error


def _flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as ``section.key`` and scalar values, all that trackers accept."""
    return {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in recipe.flat().items()
    }
