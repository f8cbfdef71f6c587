"""``train``: from a recipe to an adapter on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lorakit.data.stream_steps import StreamSteps
from lorakit.errors import BadRow, Interrupted
from lorakit.evaluation.progress import EvaluationStopped
from lorakit.openmp import yield_cores
from lorakit.recipe.check import check_recipe
from lorakit.recipe.export import write_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import Batching, build_batching
from lorakit.training.build import (
    build_accelerator,
    build_evaluator,
    build_loop,
    build_schedule,
)
from lorakit.training.checkpoint import drop_after
from lorakit.training.control import StopRequest, stop_request
from lorakit.training.engine.eager import check_optimizer
from lorakit.training.loop import Loop
from lorakit.training.output_dir import (
    Start,
    check_same_data,
    check_same_recipe,
    export_adapter,
    find_start,
    sole_run,
)
from lorakit.training.record import (
    RunRecord,
    describe_hardware,
    new_record,
    peak_memory_bytes,
    rank_list,
    rank_table,
)
from lorakit.training.setup import Prepared, prepare
from lorakit.training.tracking import PROJECT, Display, MetricsFile, Recorder, check_trackers

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """``metrics`` are those of the final evaluation of what ``adapter_dir`` holds; ``diverged``
    says that the loss ended above where it began."""

    metrics: dict[str, float]
    adapter_dir: Path
    output_dir: Path
    steps: int
    diverged: bool = False


@yield_cores()
def train(recipe: Recipe, resume: str | None = None, say: Say = lambda text: None) -> RunResult:
    """Run a recipe to its end.

    ``resume`` is None for a fresh run, ``auto`` for the newest checkpoint in the output directory
    (or a fresh run where there is none), or a checkpoint directory. Raises UserError before
    anything is written, TrainingError and Interrupted after; DataError also for a stream that
    cannot be read on, with a checkpoint saved.
    """
    check_recipe(recipe)
    start, rows_before = find_start(recipe, resume), 0
    if start.finished is not None:
        say(f"{recipe.train.output_dir}: the run is complete; nothing to do")
        return _finished(Path(recipe.train.output_dir), start.finished)
    _check_installed(recipe)
    accelerator = build_accelerator(recipe)
    prepared = prepare(recipe, say)
    if start.checkpoint is not None:
        check_same_recipe(prepared.recipe, start.checkpoint.parent.parent, prepared=True)
        rows_before = check_same_data(prepared.data, start.checkpoint, say)
    batching = build_batching(prepared, accelerator.device)
    if rows_before and isinstance(batching.steps, StreamSteps):
        batching.steps.check_holds(rows_before)
    say(plan_line(prepared, batching))
    with sole_run(prepared.recipe, resume, start) as output_dir:
        write_recipe(prepared.recipe, output_dir / "recipe.yaml")
        record = new_record(
            prepared.report,
            describe_hardware(accelerator.device),
            prepared.recipe.train.seed,
            prepared.data,
        )
        record.write(output_dir / "run.json")
        with stop_request() as stop:
            return _run(prepared, accelerator, batching, start, stop, record, say)


def dry_run(recipe: Recipe, say: Say) -> dict[str, Any]:
    """Load, inject, run one step; write nothing. Returns the plan and the step's loss."""
    _check_installed(recipe)
    accelerator = build_accelerator(recipe)
    prepared = prepare(recipe, say, write_cache=False)
    steps = build_batching(prepared, accelerator.device).steps
    schedule = build_schedule(prepared.recipe, steps)
    recorder: Any = None
    loop = build_loop(prepared, accelerator, steps, schedule, recorder, StopRequest(), say)
    loss = loop.step_once()
    return {
        "adapted_modules": len(prepared.report.adapted_modules),
        "trainable_parameters": prepared.report.trainable_parameters,
        "total_parameters": prepared.report.total_parameters,
        "coverage": asdict(coverage) if (coverage := prepared.report.coverage) else None,
        "train_rows": _trained_rows(prepared.data["train"]),
        "eval_rows": len(prepared.evaluation.split) if prepared.evaluation else 0,
        "steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "eval_every_steps": schedule.eval_every_steps,
        "save_every_steps": schedule.save_every_steps,
        "device": str(accelerator.device),
        "first_loss": loss,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }


def _trained_rows(data: dict[str, Any]) -> int | None:
    return None if data["rows"] is None else data["rows"] - data["skipped_rows"]


def _check_installed(recipe: Recipe) -> None:
    check_trackers(recipe.train.trackers)
    check_optimizer(recipe.train.optimizer)


def plan_line(prepared: Prepared, batching: Batching) -> str:
    """What is about to happen, in one line."""
    schedule = build_schedule(prepared.recipe, batching.steps)
    epoch = f" ({schedule.steps_per_epoch:,} an epoch)" if schedule.steps_per_epoch else ""
    rows = prepared.evaluation
    return f"{batching.described}: {schedule.total_steps:,} steps{epoch}; " + (
        f"evaluation on {len(rows.split):,} rows" if rows else "no validation split"
    )


def _run(
    prepared: Prepared,
    accelerator: Accelerator,
    batching: Batching,
    start: Start,
    stop: StopRequest,
    record: RunRecord,
    say: Say,
) -> RunResult:
    recipe, output_dir = prepared.recipe, Path(prepared.recipe.train.output_dir)
    schedule = build_schedule(recipe, batching.steps)
    if recipe.train.trackers:
        accelerator.init_trackers(PROJECT, _tracked(recipe))
    kept_lines = start.snapshot.progress.metrics_lines if start.snapshot else 0
    metrics_file = MetricsFile(output_dir / "metrics.jsonl", kept_lines)
    recorder = Recorder(metrics_file, Display(schedule.total_steps, start.step), accelerator)
    loop: Loop | None = None
    try:
        loop = build_loop(prepared, accelerator, batching.steps, schedule, recorder, stop, say)
        if start.checkpoint and start.snapshot:
            drop_after(loop.checkpoint_dir, start.step)
            loop.resume(start.checkpoint, start.snapshot)
            say(f"resumed from {start.checkpoint}")
            if recipe.task.streaming:
                say("the rows that were trained on are read once more and passed over")
        loop.run()
        # Of the last weights; the best ones may be older.
        diverged = loop.divergence()
        record.diverged = diverged is not None
        for note in batching.notes(recipe):
            say(note)
        if loop.progress.best_step not in (0, loop.progress.step):
            say(f"the adapter is that of step {loop.progress.best_step}, the best evaluation's")
        metrics = _final_metrics(prepared, loop, recorder)
        record.metrics = metrics
        _fill(record, loop)
        if ranks := loop.hooks.ranks():
            record.ranks = rank_list(ranks)
            for module in record.adapted_modules:
                module["r"] = ranks[module["name"]]
            say(rank_table(ranks))
        export_adapter(prepared, output_dir / "adapter", record, say)
        record.exit_reason = "completed"
        if diverged:
            say(f"warning: {diverged}")
    except (Exception, KeyboardInterrupt) as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        record.exit_reason = "interrupted" if stopped else "failed"
        record.message = str(error) or type(error).__name__
        record.bad_row = isinstance(error, BadRow)
        if loop is not None:
            record.diverged = record.diverged or loop.broken
            _fill(record, loop)
        raise
    finally:
        recorder.close()
        record.data["train"] = record.data["train"] | batching.rows_read()
        record.write(output_dir / "run.json")
    adapter = output_dir / "adapter"
    return RunResult(record.metrics, adapter, output_dir, record.steps, record.diverged)


def _final_metrics(prepared: Prepared, loop: Loop, recorder: Recorder) -> dict[str, float]:
    """Put the best weights in place; their metrics, with text generated if that is for the end."""
    loop.best.restore(loop.trainable)
    task, config = prepared.task, prepared.recipe.task
    measured = task.generates(config, final=True) == task.generates(config, final=False)
    if prepared.evaluation is None or measured:
        return loop.progress.best_metrics
    try:
        metrics = build_evaluator(prepared, loop, final=True)()
    except EvaluationStopped as error:
        raise Interrupted(
            "stopped in the final evaluation; go on with --resume auto", loop.stop.signal_number
        ) from error
    recorder.evaluation(loop.progress.best_step, metrics)
    return metrics


def _fill(record: RunRecord, loop: Loop) -> None:
    progress = loop.progress
    record.steps, record.trained_tokens = progress.step, progress.trained_tokens
    record.seconds = round(progress.seconds, 3)
    record.peak_memory_bytes = peak_memory_bytes(loop.accelerator.device)
    record.best_step = progress.best_step or None


def _tracked(recipe: Recipe) -> dict[str, Any]:
    """The recipe as flat keys with plain values, which is all that trackers take."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str | bool) else str(value)
        for section, values in recipe.resolved().items()
        for key, value in values.items()
    }


def _finished(output_dir: Path, run: dict[str, Any]) -> RunResult:
    return RunResult(
        run.get("metrics", {}),
        output_dir / "adapter",
        output_dir,
        run.get("steps", 0),
        run.get("diverged", False),
    )
