"""``lorakit train``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value, read as YAML."),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", metavar="DIR", help="For train.output_dir.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="auto|DIR", help="Go on from a checkpoint."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load, inject, run one step, print the plan."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Train an adapter as RECIPE says, and write it to train.output_dir.

    Example: lorakit train recipes/quickstart.yaml --set train.seed=1 --resume auto
    """
    import json

    from lorakit.recipe.load import load_recipe

    changes = list(overrides or [])
    if output_dir is not None:
        changes.append(f"train.output_dir={json.dumps(output_dir)}")
    resolved = load_recipe(recipe, changes)

    from lorakit.training import run
    from lorakit.training.tracking import tell

    if dry_run:
        plan = run.dry_run(resolved, tell)
        # The coverage has been said, in words.
        lines = [f"{key:22} {value}" for key, value in plan.items() if key != "coverage"]
        typer.echo(json.dumps(plan) if as_json else "\n".join(lines))
        return
    result = run.train(resolved, resume, tell)
    facts = {
        "adapter": str(result.adapter_dir),
        "steps": result.steps,
        "metrics": result.metrics,
    } | ({"diverged": True} if result.diverged else {})
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        scores = "".join(f", {name} {value:.4f}" for name, value in result.metrics.items())
        typer.echo(f"{result.adapter_dir}: {result.steps} steps{scores}")
