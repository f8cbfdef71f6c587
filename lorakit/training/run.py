"""``lorakit train``: the stages of a run, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.data.stream_steps import StreamSteps
from lorakit.distributed.build import build_strategy
from lorakit.distributed.launcher import warn_of_launch
from lorakit.distributed.processes import (
    failures_reported,
    first_on_each_host,
    gather,
    init_process_group,
    is_main,
    run_on_main,
)
from lorakit.distributed.strategy import Strategy
from lorakit.errors import Interrupted, UserError
from lorakit.io.atomic import writing
from lorakit.openmp import yield_cores
from lorakit.pipeline.task_data import Say
from lorakit.recipe.check import check_recipe
from lorakit.recipe.export import write_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.adapter_export import export_adapter
from lorakit.training.agreement import check_agreement
from lorakit.training.base_precision import check_base_precision
from lorakit.training.batch_size import check_batch_size, fit_batch_size
from lorakit.training.batching import Batching, build_batching
from lorakit.training.build import (
    Objective,
    build_engine,
    build_loader,
    build_loop,
    build_objective,
    build_schedule,
    check_optimizer,
    plan_line,
)
from lorakit.training.checkpoint import (
    delete_after,
    readable_checkpoints,
    set_aside_after,
    skipped_line,
)
from lorakit.training.control import Schedule, StopRequest, stop_request
from lorakit.training.deterministic import deterministic_kernels, no_kernel_as_error, say_costs
from lorakit.training.execution import choose_execution
from lorakit.training.guard import Guard, naming_checkpoints
from lorakit.training.loop import Loop
from lorakit.training.offload import check_offload
from lorakit.training.output_dir import (
    Start,
    exclusive_run,
    find_start,
    none_to_resume,
    rows_read_before,
)
from lorakit.training.record import (
    RunRecord,
    describe_hardware,
    new_record,
    peak_memory_bytes,
    rank_table,
)
from lorakit.training.same_run import (
    check_same_data,
    check_same_recipe,
    with_started_batch_size,
)
from lorakit.training.setup import Prepared, prepare
from lorakit.training.tracking import (
    Display,
    MetricsFile,
    NoMetrics,
    Recorder,
    check_trackers,
    start_trackers,
)


@dataclass(frozen=True)
class RunResult:
    """``metrics`` are those of the final evaluation of the adapter in ``adapter_dir``; ``diverged``
    tells whether the loss ended above where it started."""

    metrics: dict[str, float]
    adapter_dir: Path
    output_dir: Path
    steps: int
    diverged: bool = False


@yield_cores()
def train(
    recipe: Recipe,
    resume: str | None = None,
    say: Say = lambda text: None,
    display: Callable[[int, int], Display] = Display,
) -> RunResult:
    """Train the adapter that ``recipe`` describes.

    ``resume`` is None for a new run, ``auto`` for the newest checkpoint in the output directory (a
    new run if there is none), or a checkpoint directory. ``display`` shows the progress of a run of
    so many steps that starts after some. Raises UserError before anything is
    written, and TrainingError and Interrupted afterwards. If a stream cannot be read further, saves
    a checkpoint and raises DataError.
    """
    init_process_group()
    say = _only_on_main(say)
    check_recipe(recipe)
    with (
        naming_checkpoints(Path(recipe.train.output_dir)),
        deterministic_kernels(recipe.train.deterministic),
    ):
        return _train(recipe, resume, say, display)


def _train(
    recipe: Recipe, resume: str | None, say: Say, display: Callable[[int, int], Display]
) -> RunResult:
    start = run_on_main(lambda: find_start(recipe, resume, say))
    if start.finished is not None:
        say(f"{recipe.train.output_dir}: the run is complete; nothing to do")
        return _finished(Path(recipe.train.output_dir), start.finished)
    if start.checkpoint is not None:
        recipe = with_started_batch_size(recipe, start.checkpoint.parent.parent)
    _check_support(recipe)
    say_costs(recipe.train, say)
    warn_of_launch(say)
    strategy = build_strategy(recipe.model.dtype)
    strategy.check(recipe)
    with first_on_each_host():  # whose tokens are cached for the others
        prepared = prepare(recipe, say)
    check_agreement(prepared)
    prepared, objective = fit_batch_size(prepared, strategy, say)
    batching = build_batching(prepared, strategy.device, strategy.share)
    run_on_main(lambda: _check_resumable(prepared, batching, start, say))
    say(plan_line(prepared, batching))
    with (
        _exclusive(prepared.recipe, start) as output_dir,
        stop_request() as stop,
        no_kernel_as_error(),  # here, too, since _exclusive must see a UserError
    ):
        return _run(prepared, objective, strategy, batching, start, output_dir, stop, say, display)


def _only_on_main(say: Say) -> Say:
    return say if is_main() else lambda text: None


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


def _run(
    prepared: Prepared,
    objective: Objective | None,
    strategy: Strategy,
    batching: Batching,
    start: Start,
    output_dir: Path,
    stop: StopRequest,
    say: Say,
    display: Callable[[int, int], Display],
) -> RunResult:
    recipe, adapter_dir = prepared.recipe, output_dir / "adapter"
    if is_main():
        with writing(output_dir / "recipe.yaml"):
            write_recipe(recipe, output_dir / "recipe.yaml")
    schedule = build_schedule(recipe, batching.steps)
    hardware = describe_hardware(strategy.device) | {"processes": strategy.share.world_size}
    record = new_record(
        prepared.report, hardware, recipe.train.seed, prepared.data, prepared.method.digest
    )
    record.data["train"] |= rows_read_before(start)
    record.per_device_batch_size = recipe.train.units_per_batch
    with (
        record.saved_to(output_dir / "run.json") if is_main() else nullcontext(),
        closing(_open_recorder(recipe, output_dir, schedule, start, display)) as recorder,
        failures_reported(),
    ):
        guard = Guard(output_dir, record.process) if is_main() else None
        gather(None)  # building waits for all processes, also if one of them could not write
        loop = build_loop(
            prepared, objective, strategy, batching.steps, schedule, recorder, stop, guard, say
        )
        try:
            _resume(loop, start, recipe, say)
            loop.run()
            warning = loop.divergence()  # of the last weights, which may not be the best
            record.diverged = warning is not None
            _say_notes(loop, batching, recipe, say)
            record.metrics = loop.finish()
        except Interrupted:
            record.bad_row = loop.loader.met_bad_row()
            raise
        finally:
            record.diverged |= loop.broken
            record.update(loop.progress, strategy.device)
            record.data["train"] |= loop.loader.rows_read()
        if ranks := loop.engine.ranks():
            record.set_ranks(ranks)
            say(rank_table(ranks))
        run_on_main(lambda: _export(prepared, adapter_dir, record, guard, say))
    if warning:
        say(f"warning: {warning}")
    return RunResult(record.metrics, adapter_dir, output_dir, record.steps, record.diverged)


def _export(
    prepared: Prepared, adapter_dir: Path, record: RunRecord, guard: Guard | None, say: Say
) -> None:
    if guard is not None:
        guard.check()
    with writing(adapter_dir):
        export_adapter(prepared, adapter_dir, record, say)


def dry_run(recipe: Recipe, say: Say) -> dict[str, Any]:
    """Load, inject and take one step without writing anything; return the plan and the loss."""
    init_process_group()
    say = _only_on_main(say)
    with deterministic_kernels(recipe.train.deterministic):
        return _plan(recipe, say)


def _plan(recipe: Recipe, say: Say) -> dict[str, Any]:
    _check_support(recipe)
    say_costs(recipe.train, say)
    strategy = build_strategy(recipe.model.dtype)
    strategy.check(recipe)
    prepared, objective = fit_batch_size(prepare(recipe, say, write_cache=False), strategy, say)
    steps = build_batching(prepared, strategy.device, strategy.share).steps
    schedule = build_schedule(prepared.recipe, steps)
    execution = choose_execution(
        prepared, strategy.device, schedule.total_steps, strategy.is_sharded
    )
    objective = objective or build_objective(prepared, strategy, say)
    engine = build_engine(prepared, objective, strategy, schedule.total_steps, execution, say)
    loader = build_loader(prepared, objective, steps, strategy.device, execution)
    first = loader.take(0)
    loss = float(engine.step(first.micro_batches, first.loss_count).loss)
    return {
        "adapted_modules": len(prepared.report.adapted_modules),
        "trainable_parameters": prepared.report.trainable_parameters,
        "total_parameters": prepared.report.total_parameters,
        "coverage": asdict(coverage) if (coverage := prepared.report.coverage) else None,
        "train_rows": _train_rows(prepared.data["train"]),
        "eval_rows": len(prepared.evaluation.split) if prepared.evaluation else 0,
        "steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "eval_every_steps": schedule.eval_every_steps,
        "save_every_steps": schedule.save_every_steps,
        "device": str(strategy.device),
        "first_loss": loss,
        "peak_memory_bytes": peak_memory_bytes(strategy.device),
    }


def _check_support(recipe: Recipe) -> None:
    check_trackers(recipe.train.trackers)
    check_optimizer(recipe.train.optimizer)
    check_base_precision(recipe.model)
    check_offload(recipe.train)
    check_batch_size(recipe)


def _check_resumable(prepared: Prepared, batching: Batching, start: Start, say: Say) -> None:
    """Raise UserError or DataError if recipe or data are not those of the checkpoint's run."""
    if start.checkpoint is None:
        return
    check_same_recipe(prepared.recipe, start.checkpoint.parent.parent, prepared=True)
    rows = check_same_data(prepared.data, start.checkpoint, say)
    if rows and isinstance(batching.steps, StreamSteps):
        batching.steps.check_has_rows(rows)


def _open_recorder(
    recipe: Recipe,
    output_dir: Path,
    schedule: Schedule,
    start: Start,
    display: Callable[[int, int], Display],
) -> Recorder:
    keep = start.snapshot.progress.metrics_lines if start.snapshot else 0
    if not is_main():
        return Recorder(NoMetrics(keep), Display(schedule.total_steps, quiet=True))
    return Recorder(
        MetricsFile(output_dir / "metrics.jsonl", keep),
        display(schedule.total_steps, start.step),
        start_trackers(recipe.train.trackers, output_dir, _flat_recipe(recipe)),
    )


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


def _say_notes(loop: Loop, batching: Batching, recipe: Recipe, say: Say) -> None:
    for note in batching.notes(recipe):
        say(note)
    if loop.progress.best_step not in (0, loop.progress.step):
        say(f"the adapter is that of step {loop.progress.best_step}, which had the best evaluation")


def _train_rows(data: dict[str, Any]) -> int | None:
    return None if data["rows"] is None else data["rows"] - data["skipped_rows"]


def _flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as ``section.key`` and scalar values, all that trackers accept."""
    return {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in recipe.flat().items()
    }


def _finished(output_dir: Path, run: dict[str, Any]) -> RunResult:
    return RunResult(
        run.get("metrics", {}), output_dir / "adapter", output_dir, run.get("steps", 0),
        run.get("diverged", False),
    )  # fmt: skip
