"""``train``: from a recipe to an adapter on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from lorakit.data.batches import StepPlan, collate_causal, collate_encoder
from lorakit.errors import Interrupted, UserError
from lorakit.evaluation.watch import EvaluationStopped
from lorakit.injection import trainable_state
from lorakit.recipe.check import check_recipe
from lorakit.recipe.sections import Recipe
from lorakit.recipe.write import write_recipe
from lorakit.tasks.base import LOWER_IS_BETTER
from lorakit.training.evaluator import Evaluator
from lorakit.training.export import export_adapter
from lorakit.training.hardware import describe_hardware, peak_memory_bytes
from lorakit.training.loop import Loop, Schedule
from lorakit.training.objective import CausalObjective, EncoderObjective
from lorakit.training.optim import build_optimizer, build_scheduler, parameter_groups
from lorakit.training.output_dir import Start, find_start
from lorakit.training.record import RunRecord, new_record
from lorakit.training.setup import Prepared, main_metric, prepare
from lorakit.training.signals import StopRequest, stop_request
from lorakit.training.tracking import Display, MetricsFile, Recorder, check_trackers

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """``metrics`` are those of the final evaluation of what ``adapter_dir`` holds."""

    metrics: dict[str, float]
    adapter_dir: Path
    output_dir: Path
    steps: int


def train(recipe: Recipe, resume: str | None = None, say: Say = lambda text: None) -> RunResult:
    """Run a recipe to its end.

    ``resume`` is None for a fresh run, ``auto`` for the newest checkpoint in the output directory
    (or a fresh run where there is none), or a checkpoint directory. Raises UserError before
    anything is written, TrainingError and Interrupted after.
    """
    check_recipe(recipe)
    start = find_start(recipe, resume)
    if start.finished is not None:
        say(f"{recipe.train.output_dir}: the run is complete; nothing to do")
        return _finished(Path(recipe.train.output_dir), start.finished)
    check_trackers(recipe.train.trackers)
    accelerator = _accelerator(recipe)
    prepared = prepare(recipe, say)
    say(plan_line(prepared, _step_plan(prepared, accelerator.num_processes)))
    output_dir = Path(prepared.recipe.train.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_recipe(prepared.recipe, output_dir / "recipe.yaml")
    record = new_record(
        prepared.report,
        describe_hardware(accelerator.device),
        prepared.recipe.train.seed,
        prepared.data,
    )
    record.write(output_dir / "run.json")
    with stop_request() as stop:
        return _run(prepared, accelerator, start, stop, record, say)


def dry_run(recipe: Recipe, say: Say) -> dict[str, Any]:
    """Load, inject, run one step; write nothing. Returns the plan and the step's loss."""
    check_trackers(recipe.train.trackers)
    accelerator = _accelerator(recipe)
    prepared = prepare(recipe, say)
    plan = _step_plan(prepared, accelerator.num_processes)
    schedule = _schedule(prepared.recipe, plan)
    recorder: Any = None
    loop = _loop(prepared, accelerator, plan, schedule, recorder, StopRequest())
    loss = loop.step_once()
    return {
        "adapted_modules": len(prepared.report.adapted_modules),
        "trainable_parameters": prepared.report.trainable_parameters,
        "total_parameters": prepared.report.total_parameters,
        "train_rows": len(prepared.train),
        "eval_rows": len(prepared.evaluation.encoded) if prepared.evaluation else 0,
        "steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "eval_every_steps": schedule.eval_every_steps,
        "save_every_steps": schedule.save_every_steps,
        "device": str(accelerator.device),
        "first_loss": loss,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }


def plan_line(prepared: Prepared, plan: StepPlan) -> str:
    """What is about to happen, in one line."""
    schedule = _schedule(prepared.recipe, plan)
    rows = prepared.evaluation
    return (
        f"{len(prepared.train):,} rows, {plan.rows_per_step} a step: {schedule.total_steps:,} "
        f"steps ({schedule.steps_per_epoch:,} an epoch); "
        + (f"evaluation on {len(rows.encoded):,} rows" if rows else "no validation split")
    )


def _run(
    prepared: Prepared,
    accelerator: Accelerator,
    start: Start,
    stop: StopRequest,
    record: RunRecord,
    say: Say,
) -> RunResult:
    recipe, output_dir = prepared.recipe, Path(prepared.recipe.train.output_dir)
    plan = _step_plan(prepared, accelerator.num_processes)
    schedule = _schedule(recipe, plan)
    first_step = int(start.checkpoint.name.removeprefix("step-")) if start.checkpoint else 0
    if recipe.train.trackers:
        accelerator.init_trackers("lorakit", _tracked(recipe))
    metrics_file = MetricsFile(output_dir / "metrics.jsonl", first_step)
    recorder = Recorder(metrics_file, Display(schedule.total_steps, first_step), accelerator)
    loop: Loop | None = None
    try:
        loop = _loop(prepared, accelerator, plan, schedule, recorder, stop)
        if start.checkpoint is not None:
            loop.resume(start.checkpoint)
            say(f"resumed from {start.checkpoint}")
        loop.run()
        metrics = _final_metrics(prepared, loop, recorder)
        record.metrics = metrics
        _fill(record, loop)
        export_adapter(prepared, output_dir / "adapter", record)
        record.exit_reason = "completed"
    except (Exception, KeyboardInterrupt) as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        record.exit_reason = "interrupted" if stopped else "failed"
        record.message = str(error) or type(error).__name__
        if loop is not None:
            _fill(record, loop)
        raise
    finally:
        recorder.close()
        record.write(output_dir / "run.json")
    return RunResult(record.metrics, output_dir / "adapter", output_dir, record.steps)


def _final_metrics(prepared: Prepared, loop: Loop, recorder: Recorder) -> dict[str, float]:
    """Put the best weights in place and evaluate them in full, unless that was done already."""
    last_is_best = loop.progress.best_step in (0, loop.progress.step)
    if loop.best is not None and not last_is_best:
        with torch.no_grad():
            for name, parameter in loop.trainable.items():
                parameter.copy_(loop.best[name])
    if prepared.evaluation is None:
        return {}
    evaluator = _evaluator(prepared, loop, generate_at="end")
    if last_is_best and loop.last_metrics and not evaluator.generates:
        return loop.last_metrics
    try:
        metrics = evaluator()
    except EvaluationStopped as error:
        raise Interrupted(
            "stopped in the final evaluation; go on with --resume auto", loop.stop.signal_number
        ) from error
    recorder.evaluation(loop.progress.step, metrics)
    return metrics


def _fill(record: RunRecord, loop: Loop) -> None:
    progress = loop.progress
    record.steps, record.trained_tokens = progress.step, progress.trained_tokens
    record.seconds = round(progress.seconds, 3)
    record.peak_memory_bytes = peak_memory_bytes(loop.accelerator.device)
    record.best_step = progress.best_step or None


def _loop(
    prepared: Prepared,
    accelerator: Accelerator,
    plan: StepPlan,
    schedule: Schedule,
    recorder: Recorder,
    stop: StopRequest,
) -> Loop:
    section, model = prepared.recipe.train, prepared.model
    set_seed(section.seed)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(accelerator.device)
    build = CausalObjective if prepared.task.kind == "causal" else EncoderObjective
    objective: Any = build(model, section.label_smoothing)
    if section.compile is True:
        (objective.parts.decoder if objective.parts else model).compile(dynamic=True)
    trainable: Any = trainable_state(model)
    optimizer = build_optimizer(parameter_groups(trainable, section.weight_decay), section)
    scheduler = build_scheduler(optimizer, section, schedule.total_steps)
    wrapped, prepared_optimizer = accelerator.prepare(objective, optimizer)
    metric = main_metric(prepared.recipe, prepared.task)
    collate = collate_causal if prepared.task.kind == "causal" else collate_encoder
    loop = Loop(
        accelerator=accelerator,
        objective=wrapped,
        trainable=trainable,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        rows=prepared.train,
        plan=plan,
        collate=partial(
            collate,
            pad_id=prepared.tokenizer.pad_token_id,
            multiple_of=8 if accelerator.device.type == "cuda" else 1,
        ),
        schedule=schedule,
        recorder=recorder,
        stop=stop,
        checkpoint_dir=Path(section.output_dir) / "checkpoints",
        evaluate=None,
        best_metric=metric,
        gain=partial(_is_gain, metric),
        patience=section.early_stopping_patience,
        max_grad_norm=section.max_grad_norm,
    )
    if prepared.evaluation is not None and recorder is not None:
        loop.evaluate = _evaluator(prepared, loop, generate_at="always")
    return loop


def _evaluator(prepared: Prepared, loop: Loop, generate_at: str) -> Evaluator:
    assert prepared.evaluation is not None
    wanted = getattr(prepared.recipe.task, "eval_generate", "never")
    allowed = ("always",) if generate_at == "always" else ("always", "end")
    objective: Any = loop.accelerator.unwrap_model(loop.objective)
    return Evaluator(
        prepared,
        parts=objective.parts,
        generates=prepared.task.generates(prepared.recipe.task) and wanted in allowed,
        stop=loop.stop,
        say=loop.recorder.display.say,
    )


def _is_gain(metric: str, value: float, best: float | None) -> bool:
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best


def _step_plan(prepared: Prepared, processes: int) -> StepPlan:
    section = prepared.recipe.train
    plan = StepPlan(
        lengths=prepared.train.lengths,
        per_device_batch_size=section.per_device_batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        processes=processes,
        seed=section.seed,
        group_by_length=section.group_by_length,
    )
    if not plan.steps_per_epoch:
        raise UserError(f"task: {len(prepared.train)} training rows for {processes} processes")
    return plan


def _schedule(recipe: Recipe, plan: StepPlan) -> Schedule:
    section, epoch = recipe.train, plan.steps_per_epoch
    total = section.max_steps or max(1, round((section.epochs or 1) * epoch))
    every_eval = section.eval_every_steps or epoch
    return Schedule(
        total_steps=total,
        steps_per_epoch=epoch,
        log_every_steps=section.log_every_steps,
        eval_every_steps=every_eval,
        save_every_steps=section.save_every_steps or epoch,
        save_total_limit=section.save_total_limit,
    )


def _accelerator(recipe: Recipe) -> Accelerator:
    from accelerate.utils import ProjectConfiguration

    half = recipe.model.dtype == "float16"
    AcceleratorState._reset_state()  # a second run in one process may need another precision
    accelerator = Accelerator(
        mixed_precision="fp16" if half else "no",
        log_with=list(recipe.train.trackers) or None,
        project_config=ProjectConfiguration(recipe.train.output_dir),
    )
    if half and accelerator.device.type == "cpu":
        raise UserError(
            "model.dtype = 'float16': needs a GPU; allowed on the CPU: bfloat16, float32"
        )
    return accelerator


def _tracked(recipe: Recipe) -> dict[str, Any]:
    """The recipe as flat keys with plain values, which is all that trackers take."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str | bool) else str(value)
        for section, values in recipe.resolved().items()
        for key, value in values.items()
    }


def _finished(output_dir: Path, run: dict[str, Any]) -> RunResult:
    return RunResult(run["metrics"], output_dir / "adapter", output_dir, run["steps"])
