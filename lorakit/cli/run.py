"""``train`` and ``eval``: commands that run a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit import registry
from lorakit.cli.console import (
    AsJson,
    Overrides,
    RecipeFile,
    Subfolder,
    check_distinct,
    check_exclusive,
    check_writable,
    echo,
    in_subfolder,
    only_results,
    option_named,
    phases,
    say,
    write_output,
)
from lorakit.cli.hub import Private, PushToHub, Revision, push_options, pushed_line, target_of
from lorakit.cli.outcome import plan_text, run_text, train_command, use_command
from lorakit.errors import Interrupted, UserError, counted, decimal, shown
from lorakit.notes import silent, to_stderr

if TYPE_CHECKING:
    from lorakit.api import HubTarget, PushReport, RunResult, SplitEvaluation
    from lorakit.recipe.sections import Recipe

_OutputDir = Annotated[
    str | None, typer.Option("--output-dir", metavar="DIR", help="Override train.output_dir.")
]
_Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|DIR",
        help="Resume from the latest checkpoint, if there is one, or from checkpoint DIR.",
    ),
]
_Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier run in train.output_dir; with --push-to-hub, the repository too.",
    ),
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Load everything, run one step, print the plan; write nothing."),
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output_dir: _OutputDir = None,
    resume: _Resume = None,
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter and write it to train.output_dir/adapter.

    Under torchrun or accelerate launch, the processes share the rows of each step.

    Example: lorakit train recipes/quickstart.yaml --resume auto

    Example: lorakit train recipe.yaml --push-to-hub me/sql --private
    """
    from lorakit import api

    target = target_of(push_to_hub, private, revision, overwrite, "--push-to-hub")
    try:
        with api.process_group():
            _train(recipe, overrides, output_dir, resume, overwrite, dry_run, target, as_json)
    except Interrupted as error:
        if api.is_launched():  # with a command that is not known here
            raise
        again = push_options(push_to_hub, private, revision)
        command = train_command(recipe, overrides, output_dir, "--resume", "auto", *again)
        raise Interrupted(error.problem, error.signal_number, f"resume with: {command}") from error


def _train(
    recipe: Path,
    overrides: list[str] | None,
    output_dir: str | None,
    resume: str | None,
    overwrite: bool,
    dry_run: bool,
    target: HubTarget | None,
    as_json: bool,
) -> None:
    from lorakit import api
    from lorakit.recipe.load import open_recipe

    changes = list(overrides or [])
    if output_dir is not None:
        changes.append(f"train.output_dir={json.dumps(output_dir)}")
    with (
        only_results(),
        _output_dir_named(output_dir is not None),
        open_recipe(recipe, changes, _say()) as resolved,
    ):
        if target is not None:
            with option_named("--push-to-hub", target.repo):
                api.check_push(target, resolved.model.name_or_path, to_stderr)
        plan = api.dry_run(resolved, to_stderr) if dry_run else None
        result = None if plan else api.train(resolved, resume, to_stderr, overwrite=overwrite)
    if not api.is_main():
        return
    if plan is not None:
        echo(json.dumps(plan) if as_json else plan_text(plan))
        if not as_json:
            say(f"next: {train_command(recipe, overrides, output_dir)}")
    elif result is not None:
        pushed = None
        try:
            if target is not None:
                pushed = api.push_trained(result.adapter_dir, target, say)
        finally:
            _print_run(result, pushed, as_json)
        if not as_json and not result.diverged:
            say(f"next: {use_command(resolved, result.adapter_dir)}")


@contextmanager
def _output_dir_named(is_given: bool) -> Iterator[None]:
    """Let errors about the output directory name --output-dir, if it is given, instead of --set."""
    try:
        yield
    except UserError as error:
        if is_given:
            option = "--output-dir: train.output_dir"
            error.args = (str(error).replace("--set: train.output_dir", option),)
        raise


def _print_run(result: RunResult, pushed: PushReport | None, as_json: bool) -> None:
    if as_json:
        found = {
            "adapter": str(result.adapter_dir), "steps": result.steps, "metrics": result.metrics
        }  # fmt: skip
        found |= {"diverged": True} if result.diverged else {}
        echo(json.dumps(found | ({"hub": pushed.url} if pushed else {})))
    else:
        echo(run_text(result))
        if pushed is not None:
            echo(pushed_line(pushed))


_Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Evaluate this adapter [default: train.output_dir/adapter]."),
]
_Base = Annotated[bool, typer.Option("--base", help="Evaluate the base model without an adapter.")]
_Split = Annotated[
    str | None,
    typer.Option(metavar="S", help="Evaluate this split [default: the task's evaluation split]."),
]
_Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Evaluate only the first N rows.")
]
_Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the result to FILE, as JSON.")
]
_SavePredictions = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write predictions to FILE, which --predictions reads."),
]
_Predictions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help='Score the predictions in FILE: {"prediction": ...}, one per line.'
    ),
]


def eval_(
    recipe: RecipeFile,
    adapter: _Adapter = None,
    base: _Base = False,
    split: _Split = None,
    limit: _Limit = None,
    output: _Output = None,
    save_predictions: _SavePredictions = None,
    predictions: _Predictions = None,
    subfolder: Subfolder = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate an adapter or the base model on a task.

    Runs the recipe's task with its adapter, with --base without one, or with --predictions on
    existing predictions. Under torchrun or accelerate launch, the processes share the rows.

    Example: lorakit eval recipes/quickstart.yaml --limit 200 --json
    """
    from lorakit.api import is_main, process_group
    from lorakit.recipe.load import open_recipe

    outputs = {"--output": output, "--save-predictions": save_predictions}
    if subfolder is not None:
        if adapter is None:
            raise UserError(f"--subfolder {subfolder}: requires --adapter")
        adapter = in_subfolder(adapter, subfolder)
    with process_group():
        _check_options(adapter, base, predictions, outputs)
        with only_results(), open_recipe(recipe, overrides, _say()) as resolved:
            check_distinct(outputs, _inputs(resolved, recipe, predictions))
            if predictions is not None:
                found = _score(resolved, predictions, split, limit)
            else:
                if save_predictions is not None:
                    _check_predicts(resolved)
                found = _measure(resolved, adapter, base, split, limit)
        if is_main():
            _write_files(found, output, save_predictions)
            echo(_json(found) if as_json else _table(found))


def _check_options(
    adapter: Path | None, base: bool, predictions: Path | None, outputs: dict[str, Path | None]
) -> None:
    saves = outputs["--save-predictions"] is not None and predictions is not None
    check_exclusive(
        {
            "--adapter": adapter is not None,
            "--base": base,
            "--save-predictions": saves,
            "--predictions": predictions is not None,
        }
    )
    for option, path in outputs.items():
        check_writable(option, path)


def _inputs(recipe: Recipe, file: Path, predictions: Path | None) -> dict[Path, str]:
    """Return the files that are read, with descriptions."""
    from lorakit.api import data_files

    found = {file: "the recipe"}
    if predictions is not None:
        found[predictions] = "the file of --predictions"
    return found | dict.fromkeys(data_files(recipe.task.path), "a data file of the task")


def _score(recipe: Recipe, file: Path, split: str | None, limit: int | None) -> SplitEvaluation:
    from lorakit.api import score_predictions

    return score_predictions(recipe, file, split=split, limit=limit, say=_say())


def _measure(
    recipe: Recipe, adapter: Path | None, base: bool, split: str | None, limit: int | None
) -> SplitEvaluation:
    from lorakit.api import evaluate_split, is_main

    with phases() as report, option_named("--adapter", adapter):
        found = evaluate_split(
            recipe, adapter, base=base, split=split, limit=limit,
            on_progress=report if is_main() else None, say=_say(),
        )  # fmt: skip
    measured = adapter or f"{recipe.train.output_dir}/adapter"
    _say()(f"evaluated {'the base model' if base else measured}")
    return found


def _check_predicts(recipe: Recipe) -> None:
    task = registry.task(recipe.task.name)
    if task.kind != "encoder" and not task.generates(recipe.task):
        raise _without_predictions(recipe.task.name)


def _without_predictions(name: str) -> UserError:
    return UserError(
        f"--save-predictions: task.name = {shown(name)} is evaluated by its loss and has no "
        "predictions; hint: --set task.eval_generate=end if the task can generate"
    )


def _say() -> Callable[[str], None]:
    """Return ``say`` in the main process, a function without effect in the others."""
    from lorakit.api import is_main

    return say if is_main() else silent


def _write_files(
    found: SplitEvaluation, output: Path | None, save_predictions: Path | None
) -> None:
    from lorakit.api import prediction_lines

    if save_predictions is not None:
        if not found.predictions:  # the format that `task.name: auto` detected has none
            raise _without_predictions(found.task)
        write_output(save_predictions, prediction_lines(found.predictions))
    if output is not None:
        write_output(output, f"{_json(found)}\n")


def _json(found: SplitEvaluation) -> str:
    result = {
        "task": found.task,
        "split": found.split,
        "examples": found.examples,
        "metrics": found.metrics,
    }
    return json.dumps(result, allow_nan=False)


def _table(found: SplitEvaluation) -> str:
    width = max(map(len, found.metrics))
    lines = [f"{found.task}, {found.split}: {counted(found.examples, 'example')}"]
    lines += [f"  {name:<{width}}  {decimal(value)}" for name, value in found.metrics.items()]
    return "\n".join(lines)
