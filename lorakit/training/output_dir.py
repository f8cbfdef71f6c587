"""What already stands in the output directory: a run is never overwritten, only resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import Recipe
from lorakit.training.checkpoint import checkpoints

#: Keys that may differ between a run and its resumption: they change no number of the result.
_FREE = {"train.output_dir", "train.log_every_steps", "train.trackers", "train.save_total_limit"}


@dataclass(frozen=True)
class Start:
    """Where to begin: at a checkpoint, afresh (None), or not at all (``finished`` is run.json)."""

    checkpoint: Path | None = None
    finished: dict[str, Any] | None = None


def find_start(recipe: Recipe, resume: str | None) -> Start:
    """Raises UserError if the directory holds a run and ``resume`` does not say to go on with it,
    or if the recipe is not that run's."""
    output_dir = Path(recipe.train.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"train.output_dir: {output_dir}: a file of that name exists")
    found = checkpoints(output_dir / "checkpoints")
    run = _read_run(output_dir)
    complete = run.get("exit_reason") == "completed" and (output_dir / "adapter").is_dir()
    if resume is None:
        if found or complete:
            raise UserError(
                f"train.output_dir: {output_dir} holds "
                + ("a finished run" if complete else f"a run at {found[-1].name}")
                + "; go on with --resume auto, or name another directory"
            )
        return Start()
    if resume != "auto":
        return _named(recipe, Path(resume))
    if complete or found:
        _same_recipe(recipe, output_dir)
    if complete:
        return Start(finished=run)
    return Start(checkpoint=found[-1] if found else None)


def _named(recipe: Recipe, checkpoint: Path) -> Start:
    if not (checkpoint / "state.json").is_file():
        raise UserError(f"--resume: {checkpoint}: not a checkpoint; allowed: auto, or a step-N "
                        "directory of a run")  # fmt: skip
    _same_recipe(recipe, checkpoint.parent.parent)
    return Start(checkpoint=checkpoint)


def _read_run(output_dir: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        return run
    except (OSError, ValueError):
        return {}


def _same_recipe(recipe: Recipe, output_dir: Path) -> None:
    """A resumed run must be the run that was begun. Class names that the data gave may differ."""
    path = output_dir / "recipe.yaml"
    if not path.is_file():
        return
    before, now = _flat(load_recipe(path).resolved()), _flat(recipe.resolved())
    changed = [
        key
        for key in sorted({*before, *now} - _FREE)
        if before.get(key) != now.get(key) and not (key == "task.labels" and now.get(key) is None)
    ]
    if changed:
        listed = "; ".join(f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in changed)
        raise UserError(f"--resume: {path} is another recipe: {listed}")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": v for part, keys in values.items() for key, v in keys.items()}
