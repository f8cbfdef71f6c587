"""``validate``, ``schema``, ``methods`` and ``tasks``: what recipes may contain."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit import registry
from lorakit.cli.console import AsJson, Overrides, echo, only_results, say
from lorakit.errors import RecipeError, UserError, did_you_mean

if TYPE_CHECKING:
    from lorakit.errors import Problem
    from lorakit.recipe.sections import Recipe

_RecipeFiles = Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipe files.")]
_Check = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="FILE.py:CLASS",
        help="Check your own method, or a listed one by name. FILE.py is executed.",
    ),
]


def validate(recipes: _RecipeFiles, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check recipes, and that their files exist.

    Loads no model and no data. Reports all problems at once, and prints a line for each valid
    recipe. The exit code is 2 if any recipe is invalid. Names on the Hub are not looked up.

    Example: lorakit validate recipes/*.yaml --set train.seed=1
    """
    checked = {path: _check(path, overrides) for path in recipes}
    if as_json:
        results = [_result(path, problems) for path, (_, problems) in checked.items()]
        echo(json.dumps(results, indent=2, default=repr))
    else:
        for path, (recipe, _) in checked.items():
            if recipe is not None:
                parts = (recipe.model.name_or_path, recipe.adapter.method, recipe.task.name)
                echo(f"{path}: valid ({', '.join(parts)})")
    found = [
        _with_recipe(problem, path) if len(recipes) > 1 else problem
        for path, (_, problems) in checked.items()
        for problem in problems
    ]
    if found:
        raise RecipeError(found)


def _check(path: Path, overrides: list[str] | None) -> tuple[Recipe | None, tuple[Problem, ...]]:
    from lorakit.api import path_faults
    from lorakit.recipe.load import load_recipe

    try:
        with only_results():
            return load_recipe(path, overrides, say=say, check=path_faults), ()
    except RecipeError as error:
        return None, error.problems


def _with_recipe(problem: Problem, path: Path) -> Problem:
    """Name the recipe in a problem of an override, which belongs to no file."""
    from lorakit.recipe.diagnostics import OVERRIDE

    if problem.file != OVERRIDE:
        return problem
    return dataclasses.replace(problem, file=f"{path}: {OVERRIDE}")


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
    """Print the JSON schema of recipes.

    Editors complete keys and values, and show what they mean, in recipes that start with this line:

    # yaml-language-server: $schema=recipe.schema.json

    Example: lorakit schema > recipe.schema.json
    """
    from lorakit.recipe.export import recipe_schema

    echo(json.dumps(recipe_schema(), indent=2))


def methods(check: _Check = None, as_json: AsJson = False) -> None:
    """List the methods for adapter.method, or check one.

    Each is listed with its usual learning rates and its paper. The lower of the two learning rates
    is for models of billions of parameters, the higher one for small models.

    --check runs the contract of methods on tiny random models: the output is unchanged at the
    start, gradients reach the method's parameters only, a saved adapter loads bit for bit, the
    merged model equals the unmerged one, a resumed run equals an uninterrupted one, and the method
    works in bfloat16 and on another device. The exit code is 1 if a check fails.

    A method may also be a file, ./FILE.py:CLASS: see docs/own-method.md.

    Example: lorakit methods --json

    Example: lorakit methods --check ./my_method.py:MyMethod
    """
    from lorakit.api import aligned

    if check is not None:
        _check_method(check, as_json)
        return
    found = list(registry.methods().values())
    if as_json:
        echo(json.dumps([_method_facts(method) for method in found], indent=2))
        return
    rows = [(m.name, m.summary, m.Config.shown_learning_rates(), m.source) for m in found]
    echo(aligned(rows, left=4))
    say("or a file: ./FILE.py:CLASS; learning rates: from large models to small ones")


def _method_facts(method: Any) -> dict[str, Any]:
    rates = method.Config.usual_learning_rates
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source or None,
        "url": f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else None,
        "usual_learning_rates": None if rates is None else list(rates),
        "learning_rate_note": method.Config.learning_rate_note or None,
    }


def _check_method(name: str, as_json: bool) -> None:
    from lorakit.api import check_method

    try:
        with only_results():
            results = check_method(name)
    except KeyError:
        known = list(registry.methods())
        message = did_you_mean(f"--check {name}: unknown method", name, known)
        raise UserError(f"{message}; allowed: {', '.join(known)}, ./FILE.py:CLASS") from None
    passed = all(result.problem is None for result in results)
    if as_json:
        checks = [dataclasses.asdict(result) for result in results]
        echo(json.dumps({"method": name, "passed": passed, "checks": checks}, indent=2))
    else:
        for result in results:
            mark = "ok    " if result.problem is None else "FAILED"
            problem = "" if result.problem is None else f": {result.problem}"
            echo(f"{mark}  {result.module}: {result.check}{problem}")
    if not passed:
        raise typer.Exit(1)


def tasks(as_json: AsJson = False) -> None:
    """List the tasks for task.name.

    Each is listed with its paper; with --json, also with the columns of its rows.

    A task may also be your own file, ./FILE.py:CLASS or ./FILE.yaml; see
    docs/user-task.md.

    Example: lorakit tasks --json
    """
    from lorakit.api import aligned

    found = registry.tasks().items()
    if as_json:
        echo(json.dumps([_task_facts(name, task) for name, task in found], indent=2))
        return
    rows = [(name, task.summary_of(name), task.source_of(name)) for name, task in found]
    echo(aligned(rows, left=3))
    say("or a file: ./FILE.py:CLASS, ./FILE.yaml")


def _task_facts(name: str, task: Any) -> dict[str, Any]:
    return {
        "name": name,
        "summary": task.summary_of(name),
        "source": task.source_of(name) or None,
        "model": task.kind,
        "columns": [list(columns) for columns in task.needed_columns(name)],
    }
