"""``lorakit train``: the stages of a run, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.data.stream_steps import StreamSteps
from lorakit.distributed.build import build_strategy
from lorakit.distributed.group import init_process_group, is_main
from lorakit.distributed.launcher import warn_of_launch
from lorakit.distributed.processes import first_on_each_host, run_on_main
from lorakit.distributed.strategy import Strategy
from lorakit.host.openmp import yield_cores
from lorakit.notes import Say, silent
from lorakit.recipe.check import check_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.agreement import check_agreement, check_same_command
from lorakit.training.base_precision import check_base_precision
from lorakit.training.batch_size import check_batch_size, fit_batch_size
from lorakit.training.batching import Batching, LoadedStep, StepLoader, build_batching
from lorakit.training.build import (
    build_engine_and_loader,
    build_loop,
    build_schedule,
    check_optimizer,
    plan_lines,
)
from lorakit.training.control import Schedule, stop_request
from lorakit.training.deterministic import deterministic_kernels, say_costs
from lorakit.training.engine import StepResult
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.guard import Guard, naming_checkpoints
from lorakit.training.length import check_length
from lorakit.training.loop import Loop
from lorakit.training.offload import check_offload
from lorakit.training.output_dir import Start, find_start
from lorakit.training.record import peak_memory_bytes
from lorakit.training.same_run import (
    as_started,
    check_same_chat_template,
    check_same_data,
    check_same_recipe,
)
from lorakit.training.session import RunResult, Session
from lorakit.training.setup import Prepared, prepare
from lorakit.training.steps import StopAt, drive
from lorakit.training.tracking import Display, Recorder, check_trackers


@yield_cores()
def train(
    recipe: Recipe,
    resume: str | None = None,
    say: Say = silent,
    display: Callable[[int, int], Display] = Display,
    overwrite: bool = False,
    stop_at: StopAt | None = None,
) -> RunResult:
    """Train the adapter that ``recipe`` describes.

    ``resume`` is None for a new run, ``auto`` for the newest checkpoint in the output directory (a
    new run if there is none), or a checkpoint directory. With ``overwrite``, the run replaces an
    earlier one in the output directory, which is deleted at the first checkpoint of the new one.
    ``display`` receives the number of steps and the number already done, and returns what shows the
    progress. ``stop_at`` can end the run after an evaluation: see ``drive``.

    Raises UserError before anything is written, and TrainingError and Interrupted afterwards. If a
    stream cannot be read further, saves a checkpoint and raises DataError.
    """
    init_process_group()
    check_same_command("train")
    say = _only_on_main(say)
    check_recipe(recipe)
    output_dir = Path(recipe.train.output_dir)
    with deterministic_kernels(recipe.train.deterministic):
        with naming_checkpoints(output_dir):
            start = run_on_main(lambda: find_start(recipe, resume, say, overwrite))
        with naming_checkpoints(output_dir, start.replaces):
            return _train(recipe, start, say, display, stop_at)


def _train(
    recipe: Recipe,
    start: Start,
    say: Say,
    display: Callable[[int, int], Display],
    stop_at: StopAt | None,
) -> RunResult:
    if start.finished is not None:
        return finished_run(recipe, start.finished, say)
    if start.checkpoint is not None:
        recipe = as_started(recipe, start.checkpoint.parent.parent)
    check_support(recipe)
    say_costs(recipe.train, say)
    warn_of_launch(say)
    strategy = build_strategy(recipe.model.dtype)
    strategy.check(recipe)
    with first_on_each_host():  # whose tokens are cached for the others
        prepared = prepare(recipe, say, resumes=start.checkpoint is not None)
    check_agreement(prepared)
    prepared, objective = fit_batch_size(prepared, strategy, say)
    batching = build_batching(prepared, strategy.device, strategy.share)
    run_on_main(lambda: check_resumable(prepared, batching, start, say))
    for line in plan_lines(prepared, batching):
        say(line)
    with stop_request() as stop:

        def build(schedule: Schedule, recorder: Recorder, guard: Guard | None) -> Loop:
            steps = batching.steps
            return build_loop(
                prepared, objective, strategy, steps, schedule, recorder, stop, guard, say
            )

        session = Session(prepared, strategy, batching, start, build, display, say)
        return drive(session.steps(), stop_at)


def _only_on_main(say: Say) -> Say:
    return say if is_main() else silent


def finished_run(recipe: Recipe, run: dict[str, Any], say: Say) -> RunResult:
    """The result of a complete run, from its run.json."""
    output_dir = Path(recipe.train.output_dir)
    say(f"{output_dir}: the run is complete; nothing to do")
    return RunResult(
        run.get("metrics", {}), output_dir / "adapter", output_dir, run.get("steps", 0),
        run.get("diverged", False), run.get("seconds", 0.0), run.get("main_metric"),
        run.get("best_step"),
    )  # fmt: skip


def dry_run(recipe: Recipe, say: Say) -> dict[str, Any]:
    """Load, inject and take one step without writing anything; return the plan and the loss."""
    init_process_group()
    check_same_command("train --dry-run")
    say = _only_on_main(say)
    with deterministic_kernels(recipe.train.deterministic):
        return _plan(recipe, say)


@dataclass(frozen=True)
class Started:
    """A run before its first step: nothing has been written."""

    prepared: Prepared
    strategy: Strategy
    schedule: Schedule
    engine: EagerEngine
    loader: StepLoader

    def step(self, loaded: LoadedStep) -> StepResult:
        """Take a step that ``loader`` has loaded."""
        return self.engine.step(loaded.micro_batches, loaded.loss_count)


def start_unwritten(recipe: Recipe, say: Say) -> Started:
    """Load and inject, and build what takes the steps of a run; raises UserError as ``train``."""
    check_support(recipe)
    say_costs(recipe.train, say)
    strategy = build_strategy(recipe.model.dtype)
    strategy.check(recipe)
    prepared, objective = fit_batch_size(prepare(recipe, say, write_cache=False), strategy, say)
    batching = build_batching(prepared, strategy.device, strategy.share)
    if batching.warning:
        say(batching.warning)
    schedule = build_schedule(prepared.recipe, batching.steps)
    _, engine, loader = build_engine_and_loader(
        prepared, objective, strategy, batching.steps, schedule.total_steps, say
    )
    return Started(prepared, strategy, schedule, engine, loader)


def _plan(recipe: Recipe, say: Say) -> dict[str, Any]:
    run = start_unwritten(recipe, say)
    prepared, schedule, strategy = run.prepared, run.schedule, run.strategy
    loss = float(run.step(run.loader.take(0)).loss)
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


def check_support(recipe: Recipe) -> None:
    """Raise UserError for what the installed packages and the device do not support."""
    check_trackers(recipe.train.trackers)
    check_optimizer(recipe.train.optimizer)
    check_base_precision(recipe.model)
    check_offload(recipe.train)
    check_batch_size(recipe)


def check_resumable(prepared: Prepared, batching: Batching, start: Start, say: Say) -> None:
    """Raise UserError or DataError if recipe or data are not those of the checkpoint's run."""
    if start.checkpoint is None or start.snapshot is None:
        return
    run = start.checkpoint.parent.parent
    if not (run / "recipe.yaml").is_file():
        say(f"warning: {run}: no recipe.yaml, so the recipe is not compared with that of the run")
    processes = len(start.snapshot.random)
    check_same_recipe(prepared.recipe, run, prepared=True, processes=processes)
    check_same_chat_template(prepared.tokenizer, run)
    check_length(prepared, batching.steps, start, say)
    rows = check_same_data(prepared.data, start.checkpoint, say)
    if rows and isinstance(batching.steps, StreamSteps):
        batching.steps.check_has_rows(rows)


def _train_rows(data: dict[str, Any]) -> int | None:
    if "sources" in data:
        return sum(int(source["rows_per_epoch"]) for source in data["sources"])
    return None if data["rows"] is None else data["rows"] - data["skipped_rows"]
