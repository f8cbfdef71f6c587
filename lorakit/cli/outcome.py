"""What ``train`` prints when it ends: the result or plan in words, and what to run next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import registry
from lorakit.errors import counted, decimal, duration, memory_size

if TYPE_CHECKING:
    from lorakit.api import RunResult
    from lorakit.recipe.sections import Recipe


def train_command(
    recipe: Path, overrides: list[str] | None, output_dir: str | None, *options: str
) -> str:
    """``lorakit train`` for a shell, with further ``options``."""
    changes = [part for change in overrides or [] for part in ("--set", change)]
    changes += [] if output_dir is None else ["--output-dir", output_dir]
    return shlex.join(["lorakit", "train", str(recipe), *changes, *options])


def use_command(recipe: Recipe, adapter: Path) -> str:
    """A command for a shell that uses the trained adapter."""
    model = recipe.model
    if registry.task(recipe.task.name).kind == "encoder":
        command = ["lorakit", "predict", str(adapter), "--text", "..."]
    else:
        command = ["lorakit", "generate", model.name_or_path, "--adapter", str(adapter)]
        command += ["--chat"] if recipe.task.name == "chat" else ["--prompt", "..."]
    command += ["--revision", model.revision] if model.revision else []
    command += ["--trust-remote-code"] if model.trust_remote_code else []
    command += ["--method", recipe.adapter.method] if ":" in recipe.adapter.method else []
    return " ".join('"..."' if part == "..." else shlex.quote(part) for part in command)


def run_text(result: RunResult) -> str:
    """The adapter's directory, the steps, the time and the metric to report first."""
    text = f"{result.adapter_dir}: {counted(result.steps, 'step')} in {duration(result.seconds)}"
    best = result.main_metric
    if best in result.metrics:
        return f"{text}, best {best} {decimal(result.metrics[best])} at step {result.best_step}"
    return text + "".join(f", {name} {decimal(value)}" for name, value in result.metrics.items())


def plan_text(plan: dict[str, Any]) -> str:
    """The plan of a dry run in words; the coverage is printed on stderr."""
    from lorakit.api import aligned

    trained, total = plan["trainable_parameters"], plan["total_parameters"]
    rows, steps, epoch = plan["train_rows"], plan["steps"], plan["steps_per_epoch"]
    modules = counted(plan["adapted_modules"], "module")
    figures = {
        "training": f"{trained:,} of {total:,} parameters ({trained / total:.3%}), {modules}",
        "data": ("a stream of rows" if rows is None else counted(rows, "training row"))
        + f", {counted(plan['eval_rows'], 'evaluation row')}",
        "steps": f"{steps:,}" + (f" ({epoch:,} per epoch)" if epoch else ""),
        "evaluation": _every(plan["eval_every_steps"]) if plan["eval_rows"] else "none",
        "checkpoints": _every(plan["save_every_steps"]),
        "first loss": decimal(plan["first_loss"]),
        "peak memory": f"{memory_size(plan['peak_memory_bytes'])} ({plan['device']})",
    }
    return aligned(list(figures.items()), left=2)


def _every(steps: int) -> str:
    return "after each step" if steps == 1 else f"every {steps:,} steps and at the end"
