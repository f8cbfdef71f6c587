"""``lorakit train``: the main job.

``lorakit eval``: the recipe's task on an adapter, on the base, or on ready predictions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.output import check_distinct, check_writable, phases, say, write_text
from lorakit.distributed.processes import is_main, process_group
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.recipe.sections import Recipe


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


def eval_(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file.")],
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Adapter [default: train.output_dir/adapter]."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base without an adapter.")] = False,
    split: Annotated[
        str | None, typer.Option(metavar="S", help="Split [default: the task's own].")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="First N rows.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the JSON object there too.")
    ] = None,
    save_predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --predictions reads.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Score these, one {"prediction": ...} a line.'),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value, read as YAML."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure an adapter, or the base, on the recipe's task.

    Under torchrun or accelerate launch the processes share the rows.

    Example: lorakit eval recipes/quickstart.yaml --limit 200 --json
    """
    from lorakit.recipe.load import load_recipe

    with process_group():
        _check_options(adapter, base, predictions, save_predictions)
        check_writable("--output", output)
        check_writable("--save-predictions", save_predictions)
        resolved = load_recipe(recipe, overrides)
        outputs = {"--output": output, "--save-predictions": save_predictions}
        check_distinct(outputs, _inputs(resolved, recipe, predictions))
        if predictions is not None:
            result = _score(resolved, predictions, split, limit)
        else:
            result = _measure(resolved, adapter, base, split, limit, save_predictions)
        if is_main():
            text = json.dumps(result, allow_nan=False)
            if output is not None:
                write_text(output, f"{text}\n")
            typer.echo(text if as_json else _table(result))


def _check_options(
    adapter: Path | None, base: bool, predictions: Path | None, save_predictions: Path | None
) -> None:
    given = {
        "--adapter": adapter is not None,
        "--base": base,
        "--save-predictions": save_predictions is not None and predictions is not None,
        "--predictions": predictions is not None,
    }
    names = [name for name, there in given.items() if there]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} exclude each other; allowed: one of them")


def _inputs(recipe: Recipe, file: Path, predictions: Path | None) -> dict[Path, str]:
    """The files that are read, and what each is."""
    from lorakit.data.paths import data_files

    found = {file: "the recipe"}
    if predictions is not None:
        found[predictions] = "the file of --predictions"
    return found | dict.fromkeys(data_files(recipe.task.path), "a file of the task")


def _score(recipe: Recipe, file: Path, split: str | None, limit: int | None) -> dict[str, Any]:
    """Score ready predictions, without loading a model library."""
    from lorakit.api import score_predictions

    told = say if is_main() else _silent
    found = score_predictions(recipe, file, split=split, limit=limit, say=told)
    return _result(found.task, found.split, found.examples, found.metrics)


def _measure(
    recipe: Recipe,
    adapter: Path | None,
    base: bool,
    split: str | None,
    limit: int | None,
    save_predictions: Path | None,
) -> dict[str, Any]:
    from lorakit import registry

    task = registry.task(recipe.task.name)
    if save_predictions is not None and not (task.kind == "encoder" or task.generates(recipe.task)):
        raise _without_predictions(recipe.task.name)

    from lorakit.api import evaluate_split, prediction_lines

    with phases() as report:
        found = evaluate_split(
            recipe, adapter, base=base, split=split, limit=limit,
            on_progress=report if is_main() else None, say=say if is_main() else _silent,
        )  # fmt: skip
    if save_predictions is not None and is_main():
        if not found.predictions:  # what "auto" chose generates nothing
            raise _without_predictions(found.task)
        write_text(save_predictions, prediction_lines(found.predictions))
    return _result(found.task, found.split, found.examples, found.metrics)


def _without_predictions(name: str) -> UserError:
    return UserError(
        f"--save-predictions: task.name = {name!r} is measured by its loss, without predictions; "
        "a task that generates makes some with --set task.eval_generate=end"
    )


def _silent(_text: str) -> None:
    """Of several processes one tells."""


def _result(task: str, split: str, examples: int, metrics: dict[str, float]) -> dict[str, Any]:
    return {"task": task, "split": split, "examples": examples, "metrics": metrics}


def _table(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    width = max(map(len, metrics))
    lines = [f"{result['task']}, {result['split']}: {result['examples']:,} examples"]
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in metrics.items()]
    return "\n".join(lines)
