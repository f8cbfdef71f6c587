"""Recipe and prepared model -> the loop's parts.

The model's metrics as it stands, on the recipe's evaluation split.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed

from lorakit import registry
from lorakit.data.plan import StepSource
from lorakit.distributed.processes import is_launched
from lorakit.errors import UserError
from lorakit.evaluation.evaluate import evaluate_model
from lorakit.injection import trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.base import Method
from lorakit.models.causal import CausalParts, use_varlen
from lorakit.models.heads import label_columns
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import build_collate, padding_multiple
from lorakit.training.checks import FirstStep, divergence
from lorakit.training.control import Best, Schedule, StopRequest
from lorakit.training.engine.eager import build_optimizer, build_scheduler, check_warmup
from lorakit.training.engine.objective import CausalObjective, EncoderObjective
from lorakit.training.loop import Loop
from lorakit.training.setup import Prepared, Say, main_metric
from lorakit.training.tracking import Recorder, throttled, trackers


def build_loop(
    prepared: Prepared,
    accelerator: Accelerator,
    steps: StepSource,
    schedule: Schedule,
    recorder: Recorder,
    stop: StopRequest,
    say: Say = lambda text: None,
) -> Loop:
    section, model = prepared.recipe.train, prepared.model
    set_seed(section.seed)
    if section.gradient_checkpointing:
        _checkpoint_activations(model, encoder=prepared.task.kind == "encoder")
    model.to(accelerator.device)
    varlen = prepared.recipe.task.packing and use_varlen(model)
    objective: Any
    if prepared.task.kind == "causal":
        # The padding behind packed rows counts as one of them.
        padding = padding_multiple(prepared, accelerator.device)
        longest = max(prepared.recipe.task.max_length, padding)
        objective = CausalObjective(model, section.label_smoothing, longest)
    else:
        labels = prepared.task.labels(prepared.recipe.task, None)
        columns = label_columns(model, labels)
        objective = EncoderObjective(model, section.label_smoothing, columns)
    if section.compile is True:
        (objective.parts.decoder if objective.parts else model).compile(dynamic=True)
    trainable: Any = trainable_state(model)
    method: Method = registry.methods()[prepared.recipe.adapter.method]
    layers = adapter_layers(model)
    groups = method.param_groups(trainable, layers, prepared.recipe.adapter, section)
    optimizer = build_optimizer(groups, section)
    hooks = method.hooks(layers, prepared.recipe.adapter, schedule.total_steps)
    scheduler = build_scheduler(optimizer, section, schedule.total_steps)
    wrapped, prepared_optimizer = accelerator.prepare(objective, optimizer)
    metric = main_metric(prepared.recipe, prepared.task)
    loop = Loop(
        accelerator=accelerator,
        objective=wrapped,
        trainable=trainable,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        steps=steps,
        collate=build_collate(prepared, accelerator.device, varlen),
        schedule=schedule,
        recorder=recorder,
        stop=stop,
        checkpoint_dir=Path(section.output_dir) / "checkpoints",
        evaluate=None,
        best=Best(metric, section.early_stopping_patience),
        max_grad_norm=section.max_grad_norm,
        hooks=hooks,
        cause=divergence(section.learning_rate, method.advice(prepared.recipe.adapter)),
    )
    loop.check_first_step = FirstStep(
        model,
        say,
        whole=_asked_whole(prepared),
        counts=section.compile is not True,
    ).check
    if prepared.evaluation is not None and recorder is not None:
        loop.evaluate = build_evaluator(prepared, loop, final=False)
    return loop


def _asked_whole(prepared: Prepared) -> list[str]:
    """The modules that train whole because the recipe names them."""
    asked = prepared.recipe.adapter.modules_to_save
    whole = prepared.report.modules_to_save
    return [n for n in whole if any(n == end or n.endswith(f".{end}") for end in asked)]


def _checkpoint_activations(model: Any, encoder: bool) -> None:
    """Later releases of transformers 5 deprecate ``gradient_checkpointing_enable``."""
    if encoder:  # else transformers warns that it turns the cache off
        model.config.use_cache = False
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_evaluator(prepared: Prepared, loop: Loop, final: bool) -> Evaluator:
    assert prepared.evaluation is not None
    objective: Any = loop.accelerator.unwrap_model(loop.objective)
    return Evaluator(
        prepared,
        parts=objective.parts,
        generates=prepared.task.generates(prepared.recipe.task, final),
        stop=loop.stop,
        say=loop.recorder.display.say,
    )


def build_schedule(recipe: Recipe, steps: StepSource) -> Schedule:
    section, epoch = recipe.train, steps.steps_per_epoch
    assert section.max_steps or epoch, "a stream has max_steps"
    total = section.max_steps or max(1, round((section.epochs or 1) * (epoch or 1)))
    method: Method = registry.methods()[recipe.adapter.method]
    method.check_steps(recipe.adapter, total)
    check_warmup(section, total)
    return Schedule(
        total_steps=total,
        steps_per_epoch=epoch,
        log_every_steps=section.log_every_steps,
        eval_every_steps=section.eval_every_steps or epoch or total,
        save_every_steps=section.save_every_steps or epoch or total,
        save_total_limit=section.save_total_limit,
    )


def build_accelerator(recipe: Recipe) -> Accelerator:
    if is_launched():
        raise UserError(
            f"launched as {os.environ['WORLD_SIZE']} processes: this version trains in one; "
            "allowed: one process, with or without accelerate launch"
        )
    half = recipe.model.dtype == "float16"
    AcceleratorState._reset_state()  # a second run in one process may need another precision
    accelerator = Accelerator(
        mixed_precision="fp16" if half else "no",
        log_with=trackers(recipe.train.trackers) or None,
        project_config=ProjectConfiguration(recipe.train.output_dir),
    )
    if half and accelerator.device.type == "cpu":
        raise UserError(
            "model.dtype = 'float16': needs a GPU; allowed on the CPU: bfloat16, float32"
        )
    return accelerator


@dataclass(frozen=True)
class Evaluator:
    """``generates``: whether to write text and score it, or to take the loss alone."""

    prepared: Prepared
    parts: CausalParts | None
    generates: bool
    stop: StopRequest
    say: Callable[[str], None]

    def __call__(self) -> dict[str, float]:
        """Raises EvaluationStopped if a signal arrives in between."""
        data, recipe = self.prepared.evaluation, self.prepared.recipe
        assert data is not None
        return evaluate_model(
            self.prepared.model,
            self.prepared.tokenizer,
            data,
            batch_size=recipe.eval_batch_size,
            parts=self.parts,
            generate=self.generates,
            seed=recipe.train.seed,
            on_progress=throttled(self.say),
            should_stop=lambda: bool(self.stop),
        ).metrics
