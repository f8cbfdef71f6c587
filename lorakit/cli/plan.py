"""``plan``: what a run will need, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.console import (
    AsJson,
    Overrides,
    RecipeFile,
    check_exclusive,
    echo,
    only_results,
    say,
)
from lorakit.errors import counted, duration, memory_size

if TYPE_CHECKING:
    from lorakit.api import RunPlan

_Measure = Annotated[
    bool,
    typer.Option("--measure", help="Also load the model, and time the run's first steps here."),
]
_Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Plan for another GPU: h100, h200, a100, a100-40gb, l40s, l4, a10g, rtx4090, rtx3090.",
    ),
]
_DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Plan for a GPU with this much memory, such as 24GiB [default: this machine's].",
    ),
]
_PARTS = {
    "weights": "base model, frozen",
    "adapter": "trained values",
    "gradients": "of the trained values",
    "optimizer": "its state",
    "activations": "kept for the backward pass",
    "logits": "output layer and loss",
    "workspace": "computed and freed again, and libraries",
}


def plan(
    recipe: RecipeFile,
    measure: _Measure = False,
    gpu: _Gpu = None,
    device_memory: _DeviceMemory = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, steps and time of a run.

    Reads the data and the configuration of the model, not its weights. Prints what to change if the
    run does not fit.

    Example: lorakit plan recipes/quickstart.yaml --gpu h100
    """
    from lorakit import api
    from lorakit.recipe.load import open_recipe

    check_exclusive({"--measure": measure, "--gpu": gpu is not None})
    check_exclusive({"--measure": measure, "--device-memory": device_memory is not None})
    with only_results(), open_recipe(recipe, overrides, say) as resolved:
        found = api.plan(resolved, gpu=gpu, device_memory=device_memory, measure=measure, say=say)
    echo(json.dumps(found.to_json()) if as_json else _text(found))


def _text(plan: RunPlan) -> str:
    blocks = [_run(plan), _memory(plan), _costs(plan), _advice(plan)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _run(plan: RunPlan) -> list[str]:
    step = plan.step
    rows, tokens = step.batches.largest.input_ids.shape
    return [
        f"{step.report.trainable_parameters:,} of {step.report.total_parameters:,} parameters "
        "are trainable",
        f"{_steps(plan)}; largest batch {rows} x {tokens:,} tokens; {_MODES[step.mode]}",
    ]


def _memory(plan: RunPlan) -> list[str]:
    memory = plan.step.memory
    rows = [(name, getattr(memory, name), what) for name, what in _PARTS.items()]
    total = memory_size(plan.device.memory_bytes)
    rows.append(("peak", memory.peak, f"{'fits' if plan.fits else 'does not fit'} into {total}"))
    if (found := plan.measured) is not None:
        what = f"peak of the first {found.first_steps + found.steps} steps"
        rows.append(("measured", found.peak_memory_bytes, what))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}} {memory_size(size):>10}  {what}" for name, size, what in rows]
    return [f"Memory on {plan.device.name}, an estimate:", *lines]


def _costs(plan: RunPlan) -> list[str]:
    return [f"{plan.flops_per_token / 1e9:.3g} GFLOP per token, forward and backward", _time(plan)]


def _advice(plan: RunPlan) -> list[str]:
    if plan.fits:
        return []
    if not plan.suggestions:
        return ["None of the changes that were tried needs less memory."]
    lines = [
        f"  {memory_size(found.peak_bytes):>10}  {'fits    ' if found.fits else 'too much'}  "
        f"{_changes(found.set)}"
        for found in plan.suggestions
    ]
    return ["Keys that lower the peak (--set KEY=VALUE):", *lines]


_MODES = {
    "eager": "run eagerly",
    "cuda_graphs": "replayed as CUDA graphs",
    "compiled_layers": "each layer compiled",
}


def _steps(plan: RunPlan) -> str:
    steps, tokens = plan.step.steps, plan.step.batches.tokens_per_epoch
    text = "an unknown number of steps" if steps is None else counted(steps, "step")
    if steps is None:
        text += " (hint: --set train.max_steps=N, or provide the data and the model's tokenizer)"
    return text if tokens is None else f"{text}; {tokens:,} tokens per epoch"


def _time(plan: RunPlan) -> str:
    if plan.measured is not None and plan.seconds is not None:
        return (
            f"{duration(plan.seconds)} for all steps, from {plan.measured.steps} measured steps "
            f"({plan.measured.tokens_per_second:,.0f} tokens/s), without evaluations"
        )
    if plan.seconds is None and plan.step.steps is None:
        return "time unknown, as the number of steps is"
    if plan.seconds is None:
        return "time unknown: --measure times steps on this device, --gpu estimates it for another"
    return f"about {duration(plan.seconds)} for all steps, an estimate, without evaluations"


def _changes(changes: dict[str, object]) -> str:
    return " ".join(
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )
