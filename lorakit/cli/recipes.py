"""``validate``, ``schema``, ``methods`` and ``tasks``: what recipes may contain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit import registry
from lorakit.cli.console import AsJson, Overrides
from lorakit.errors import RecipeError

if TYPE_CHECKING:
    from lorakit.errors import Problem
    from lorakit.recipe.sections import Recipe

_RecipeFiles = Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipe files.")]


def validate(recipes: _RecipeFiles, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check recipes and report all problems at once, without loading a model.

    Prints a line for each valid recipe. The exit code is 2 if any recipe is invalid.

    Example: lorakit validate recipes/*.yaml --set train.seed=1
    """
    checked = {path: _check(path, overrides) for path in recipes}
    if as_json:
        results = [_result(path, problems) for path, (_, problems) in checked.items()]
        typer.echo(json.dumps(results, indent=2, default=repr))
    else:
        for path, (recipe, _) in checked.items():
            if recipe is not None:
                parts = (recipe.model.name_or_path, recipe.adapter.method, recipe.task.name)
                typer.echo(f"{path}: valid ({', '.join(parts)})")
    if found := [problem for _, problems in checked.values() for problem in problems]:
        raise RecipeError(found)


def _check(path: Path, overrides: list[str] | None) -> tuple[Recipe | None, tuple[Problem, ...]]:
    from lorakit.recipe.load import load_recipe

    try:
        return load_recipe(path, overrides), ()
    except RecipeError as error:
        return None, error.problems


def _result(path: Path, problems: tuple[Problem, ...]) -> dict[str, Any]:
    listed = [
        {
            "file": problem.file,
            "line": problem.line,
            "key": problem.key,
            "value": problem.value,
            "message": problem.message,
            "allowed": problem.allowed,
        }
        for problem in problems
    ]
    return {"recipe": str(path), "valid": not problems, "problems": listed}


def schema() -> None:
    """Print the JSON schema of recipes, from which editors complete keys and values.

    Example: lorakit schema > recipe.schema.json; then put this line at the top of a recipe:
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    from lorakit.recipe.export import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def methods(as_json: AsJson = False) -> None:
    """List the methods for adapter.method.

    Example: lorakit methods --json
    """
    _list({name: method.summary for name, method in registry.methods().items()}, as_json)


def tasks(as_json: AsJson = False) -> None:
    """List the tasks for task.name, which may also be a file: ./FILE.py:CLASS or ./FILE.yaml.

    See docs/user-task.md for tasks in files.

    Example: lorakit tasks --json
    """
    _list({name: task.summary for name, task in registry.tasks().items()}, as_json)
    if not as_json:
        typer.echo("or a file: ./FILE.py:CLASS, ./FILE.yaml", err=True)


def _list(summaries: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        listed = [{"name": name, "summary": summary} for name, summary in summaries.items()]
        typer.echo(json.dumps(listed, indent=2))
        return
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        typer.echo(f"{name:<{width}}  {summary}")
