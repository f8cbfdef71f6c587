"""Assemble the parts of a training: objective, optimizer, engine, loader, schedule and loop."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from lorakit import registry
from lorakit.data.plan import StepSource
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.strategy import Strategy
from lorakit.errors import UserError, counted
from lorakit.injection import trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.base import Method
from lorakit.models.cpu_attention import use_cpu_attention
from lorakit.models.fast_operators import use_fast_operators
from lorakit.models.first_token import skip_unread_tokens
from lorakit.models.heads import label_columns, reads_first_token
from lorakit.models.master_weights import base_dtype
from lorakit.notes import Say
from lorakit.recipe.sections import Recipe, TrainSection
from lorakit.training.base_precision import quantize_fp8, quantize_nf4
from lorakit.training.batching import (
    Batching,
    StepLoader,
    bucketed,
    build_collate,
    padding_multiple,
)
from lorakit.training.checkpoint import Progress
from lorakit.training.control import Best, Evaluator, Schedule, StopRequest
from lorakit.training.divergence import divergence_cause
from lorakit.training.engine.cuda_graph import CudaGraphEngine
from lorakit.training.engine.eager import CausalObjective, EagerEngine, EncoderObjective
from lorakit.training.engine.member import MemberEngine
from lorakit.training.engine.probe import GradientProbe
from lorakit.training.execution import Execution, choose_execution
from lorakit.training.fast_layers import compile_layers, fuse_layers
from lorakit.training.guard import Guard
from lorakit.training.learning_rate import build_scheduler, check_warmup
from lorakit.training.loop import Loop
from lorakit.training.memory import out_of_memory
from lorakit.training.offload import LayerStore, offload_layers
from lorakit.training.setup import Prepared, main_metric
from lorakit.training.tracking import Recorder

Objective = CausalObjective | EncoderObjective


def build_objective(prepared: Prepared, strategy: Strategy, say: Say) -> Objective:
    """Seed the run, place the model on the device and wrap it in its objective. An nf4 base is
    quantized here."""
    # Each process drops out other elements.
    set_seed((prepared.recipe.train.seed + rank_and_world_size()[0]) % 2**32)
    objective = wrap_model(prepared, strategy, say)
    problem = prepared.task.problem(prepared.recipe.task)
    if reads_first_token(problem) and _is_eager_on_cpu(prepared, strategy):
        skip_unread_tokens(prepared.model)
    return objective


def wrap_model(prepared: Prepared, strategy: Strategy, say: Say) -> Objective:
    """Place the model on the device, and wrap it in its objective."""
    section, device = prepared.recipe.train, strategy.device
    model: Any = prepared.model
    if section.gradient_checkpointing and prepared.task.kind == "encoder":
        model.config.use_cache = False  # a recomputed layer would extend the cache again
    if section.gradient_checkpointing is True:
        _checkpoint_activations(model)
    if prepared.recipe.model.base_precision == "nf4":
        say(quantize_nf4(model, device))
    if note := strategy.place(model, checkpoints=bool(section.gradient_checkpointing)):
        say(note)
    if device.type == "cpu" and section.kernels == "auto" and section.compile is not True:
        use_cpu_attention(model)
    if prepared.task.kind == "encoder":
        columns = label_columns(model, prepared.task.labels(prepared.recipe.task, None))
        return EncoderObjective(model, section.label_smoothing, columns, prepared.class_weights)
    task = prepared.recipe.task
    # The padding after packed rows is treated as one more row.
    longest_row = max(task.max_length, padding_multiple(prepared, device))
    return CausalObjective(
        model, section.label_smoothing, task.packing, longest_row, section.kernels
    )


def _is_eager_on_cpu(prepared: Prepared, strategy: Strategy) -> bool:
    return strategy.device.type == "cpu" and prepared.recipe.train.compile is not True


def build_engine(
    prepared: Prepared,
    objective: Objective,
    strategy: Strategy,
    total_steps: int,
    execution: Execution,
    say: Say,
) -> EagerEngine:
    """Wrap the objective, then build everything that refers to its parameters."""
    section, model = prepared.recipe.train, prepared.model
    arrange_layers(prepared, strategy, execution, say)
    wrapped = strategy.wrap(objective)
    parameters: Any = trainable_state(model)
    method, config = prepared.method, prepared.recipe.adapter
    layers = adapter_layers(model)
    optimizer = build_optimizer(method.param_groups(parameters, layers, config, section), section)
    # Before the optimizer is wrapped: with float16, Accelerate restores the `step` method that it
    # finds then, which must be the scheduler's.
    scheduler = build_scheduler(optimizer, section, total_steps)
    parts: dict[str, Any] = {
        "strategy": strategy,
        "objective": wrapped,
        "parameters": parameters,
        "optimizer": strategy.wrap_optimizer(optimizer),
        "scheduler": scheduler,
        "hooks": method.hooks(layers, config, total_steps),
        "max_grad_norm": section.max_grad_norm,
        "probe": GradientProbe(
            model,
            say,
            fully_trained=_requested_modules(prepared),
            count_calls=execution.mode in ("eager", "cuda_graphs"),
        ),
    }
    if execution.mode == "cuda_graphs" or execution.replays:
        return CudaGraphEngine(
            **parts,
            say=say,
            layers=list(layers.values()),
            dtype=base_dtype(model),
            rows=section.units_per_batch,
            compiled=execution.replays,
            if_room=execution.if_room,
        )
    return MemberEngine(**parts) if execution.mode == "joint" else EagerEngine(**parts)


def arrange_layers(
    prepared: Prepared,
    strategy: Strategy,
    execution: Execution,
    say: Say,
    backend: Any = "inductor",
    store: LayerStore | None = None,
) -> None:
    """Prepare the model's layers, on their device, for the passes of ``execution``: fused,
    quantized to fp8, offloaded to ``store``, compiled by ``backend``."""
    section, model = prepared.recipe.train, prepared.model
    if execution.note:
        say(execution.note)
    compiled = execution.mode == "compiled_layers"
    if compiled and section.kernels == "auto":
        fuse_layers(model, strategy.is_sharded)
    elif section.kernels == "auto" and not strategy.is_sharded:
        use_fast_operators(model, recomputes=bool(section.gradient_checkpointing))
    if prepared.recipe.model.base_precision == "fp8":
        say(quantize_fp8(model))
    if section.gradient_checkpointing == "offload":
        offload_layers(model, strategy.device, compiled, backend, store, say)
    elif compiled:
        compile_layers(model, backend, has_hooks=strategy.is_sharded)


def build_loader(
    prepared: Prepared,
    objective: Objective,
    steps: StepSource,
    device: torch.device,
    execution: Execution,
) -> StepLoader:
    collate = build_collate(prepared, device, objective.varlen)
    if execution.mode == "cuda_graphs":
        collate = bucketed(collate, prepared)
    return StepLoader(steps, collate, device, on_host=execution.mode == "joint")


def build_engine_and_loader(
    prepared: Prepared,
    objective: Objective | None,
    strategy: Strategy,
    steps: StepSource,
    total_steps: int,
    say: Say,
    execution: Execution | None = None,
) -> tuple[Objective, EagerEngine, StepLoader]:
    """Build what takes the steps of a run; ``objective`` is None unless it has been built before,
    ``execution`` to choose it here."""
    objective = objective or build_objective(prepared, strategy, say)
    execution = execution or choose_execution(
        prepared, strategy.device, total_steps, strategy.is_sharded
    )
    engine = build_engine(prepared, objective, strategy, total_steps, execution, say)
    loader = build_loader(prepared, objective, steps, strategy.device, execution)
    return objective, engine, loader


def build_loop(
    prepared: Prepared,
    objective: Objective | None,
    strategy: Strategy,
    steps: StepSource,
    schedule: Schedule,
    recorder: Recorder,
    stop: StopRequest,
    guard: Guard | None,
    say: Say,
    execution: Execution | None = None,
) -> Loop:
    """Assemble the loop; for ``objective`` and ``execution`` see ``build_engine_and_loader``."""
    section = prepared.recipe.train
    objective, engine, loader = build_engine_and_loader(
        prepared, objective, strategy, steps, schedule.total_steps, say, execution
    )
    evaluator = Evaluator(
        prepared, objective.parts, recorder.display.evaluating, in_step=strategy.is_sharded
    )
    advice = prepared.method.advice(prepared.recipe.adapter)
    return Loop(
        engine=engine,
        loader=loader,
        schedule=schedule,
        recorder=recorder,
        stop=stop,
        evaluate=evaluator if prepared.evaluation is not None else None,
        best=Best(main_metric(prepared.recipe, prepared.task), section.early_stopping_patience),
        checkpoint_dir=Path(section.output_dir) / "checkpoints",
        guard=guard,
        cause=divergence_cause(section.learning_rate, advice),
        out_of_memory=partial(out_of_memory, prepared),
        progress=Progress(),
    )


def build_schedule(recipe: Recipe, steps: StepSource) -> Schedule:
    """Return the run's schedule; raises UserError if warmup or a method's phases exceed it."""
    section, epoch = recipe.train, steps.steps_per_epoch
    total = total_steps(section, epoch)
    method: Method = registry.method(recipe.adapter.method)
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


def total_steps(section: TrainSection, steps_per_epoch: int | None) -> int:
    """Return the number of steps of a run."""
    assert section.max_steps or steps_per_epoch, "a stream has max_steps"
    return section.max_steps or max(1, round((section.epochs or 1) * (steps_per_epoch or 1)))


def plan_lines(prepared: Prepared, batching: Batching) -> list[str]:
    """Describe the run that is about to start, and warn if its steps are larger than the data."""
    schedule = build_schedule(prepared.recipe, batching.steps)
    epoch = f" ({schedule.steps_per_epoch:,} per epoch)" if schedule.steps_per_epoch else ""
    evaluation = prepared.evaluation
    line = f"{batching.description}: {counted(schedule.total_steps, 'step')}{epoch}; " + (
        f"evaluation on {counted(len(evaluation.split), 'row')}"
        if evaluation
        else "no validation split"
    )
    return [line, *([batching.warning] if batching.warning else [])]


def check_optimizer(name: str) -> None:
    """Raise UserError for an optimizer whose package is not installed."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer = 'adamw_8bit': needs bitsandbytes (pip install 'lorakit[gpu]'); "
            "allowed without it: adamw, sgd"
        )


def build_optimizer(
    groups: Iterable[dict[str, Any]], section: TrainSection
) -> torch.optim.Optimizer:
    """Return the optimizer ``section.optimizer``; those of torch use their fused implementation."""
    groups = list(groups)
    adam = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
    }
    if section.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate, fused=True)
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)  # type: ignore[arg-type]
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **adam)
    return optimizer


def _requested_modules(prepared: Prepared) -> list[str]:
    """The fully trained modules that the recipe names."""
    requested = prepared.recipe.adapter.modules_to_save
    trained = prepared.report.modules_to_save
    return [n for n in trained if any(n == end or n.endswith(f".{end}") for end in requested)]


def _checkpoint_activations(model: Any) -> None:
    """Use the newer name if it exists: later releases of transformers 5 deprecate
    ``gradient_checkpointing_enable``."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
