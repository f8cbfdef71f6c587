"""``lorakit validate``: check recipes without loading weights.

``lorakit schema``: the recipe's JSON schema.

Names and their summaries on stdout.

``lorakit methods``: what ``adapter.method`` may be.

``lorakit tasks``: what ``task.name`` may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorakit.errors import Problem
    from lorakit.recipe.sections import Recipe


def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipe files.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value, read as YAML."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, an object a recipe.")
    ] = False,
) -> None:
    """Check recipes and report every problem at once; no weights are loaded.

    Prints a line for each good recipe. Exits with 2 if any is bad.

    Example: lorakit validate recipes/*.yaml --set train.seed=1
    """
    from lorakit.errors import RecipeError

    checked = {path: _check(path, overrides) for path in recipes}
    if as_json:
        import json

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
    from lorakit.errors import RecipeError
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
    """Print the JSON schema of recipes, for editors to complete from.

    Example: lorakit schema > recipe.schema.json; then begin a recipe with
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    import json

    from lorakit.recipe.export import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def print_names(summaries: Mapping[str, str], as_json: bool) -> None:
    """A line a name, the summaries aligned; or a JSON list of ``{"name", "summary"}``."""
    if as_json:
        import json

        listed = [{"name": name, "summary": summary} for name, summary in summaries.items()]
        typer.echo(json.dumps(listed, indent=2))
        return
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        typer.echo(f"{name:<{width}}  {summary}")


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the methods that adapter.method may name.

    Example: lorakit methods --json
    """
    from lorakit import registry

    print_names({name: method.summary for name, method in registry.methods().items()}, as_json)


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the tasks that task.name may name.

    It may also name your own file, ./FILE.py:CLASS or ./FILE.yaml: see docs/user-task.md.

    Example: lorakit tasks --json
    """
    from lorakit import registry

    print_names({name: task.summary for name, task in registry.tasks().items()}, as_json)
    if not as_json:
        typer.echo("or your own file: ./FILE.py:CLASS, ./FILE.yaml", err=True)
