"""``lorakit init``: write a first recipe, from options or by asking."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lorakit import registry
from lorakit.cli.console import AsJson, Overrides, echo, only_results, say
from lorakit.errors import UserError, printable

if TYPE_CHECKING:
    from lorakit.api import FirstRecipe, RecipeDraft

_T = TypeVar("_T")
#: What a question allows.
_ANSWERS = {
    "model": "a directory, or a name on the Hub",
    "data": "a file, a glob or a directory",
    "task": "a name that lorakit tasks lists",
    "method": "a name that lorakit methods lists",
    "hardware": "cpu, gpu, or gpu:24 for 24 GiB",
}

_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")]
_Model = Annotated[
    str | None, typer.Option("--model", metavar="M", help="Model directory, or name on the Hub.")
]
_Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="File, glob or directory of training rows."),
]
_Validation = Annotated[
    str | None,
    typer.Option("--validation", metavar="PATH", help="Validation rows; held out by default."),
]
_Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="T",
        help="Task; by default the one that fits the columns.",
        autocompletion=lambda: list(registry.tasks()),
    ),
]
_Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="M",
        help="Method; lora by default.",
        autocompletion=lambda: list(registry.methods()),
    ),
]
_Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware", metavar="H", help="cpu, gpu, or gpu:24 for 24 GiB; by default this machine's."
    ),
]
_Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Accept all defaults; ask only for what has none.")
]
_Replace = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")]


def init(
    model: _Model = None,
    data: _Data = None,
    validation: _Validation = None,
    task: _Task = None,
    method: _Method = None,
    hardware: _Hardware = None,
    overrides: Overrides = None,
    output: _Output = Path("recipe.yaml"),
    overwrite: _Replace = False,
    yes: _Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe for a model and data.

    The columns of the rows decide the task, their lengths the batches, and the model, the method
    and the hardware the rest; comments say why. On a terminal, asks for the options that are
    missing; Enter accepts the default in brackets. Nothing is downloaded: for a model that is not
    on this machine, lengths are estimated. --set names columns that are not recognized.

    Example: lorakit init --model models/all-minilm-l6-v2 --data reviews.csv

    Example: lorakit init --model Qwen/Qwen3-8B --data d.jsonl --hardware gpu:24

    Example: lorakit init --model M --data d.csv --set task.text_column=body
    """
    from lorakit.api import RecipeDraft, check_new

    check_new(output, overwrite)
    can_ask = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    has_own_data = task is not None and task.startswith("glue/")
    missing = [] if model else ["--model"]
    missing += [] if data or has_own_data else ["--data"]
    if missing and not can_ask:
        raise UserError(
            f"missing {' and '.join(missing)}: required when stdin is not a terminal; hint: "
            "lorakit init --help"
        )

    def start(name: str) -> RecipeDraft:
        return RecipeDraft(name, overrides=overrides, say=say)

    with only_results():
        draft = start(model) if model else _ask("model", _local_model(), start)
        if data is not None:
            draft.look_at(data, validation)
        elif not has_own_data:
            _ask("data", None, partial(draft.look_at, validation=validation))
        if can_ask and not yes:
            task, method, hardware = _choices(draft, task, method, hardware)
        written = draft.write(
            output, task=task, method=method or "lora", hardware=hardware, overwrite=overwrite
        )
    _report(written, as_json)


def _choices(
    draft: RecipeDraft, task: str | None, method: str | None, hardware: str | None
) -> tuple[str, str, str]:
    """Ask for those that are None."""
    from lorakit.api import check_hardware, check_method_name, this_hardware

    task = task or _ask("task", draft.suggested_task(), draft.check_task)
    method = method or _ask("method", "lora", check_method_name)
    return task, method, hardware or _ask("hardware", this_hardware(), check_hardware)


def _report(written: FirstRecipe, as_json: bool) -> None:
    recipe, tokens = written.recipe, written.tokens
    if as_json:
        facts = {
            "recipe": str(written.path),
            "task": recipe.task.name,
            "method": recipe.adapter.method,
            "rows": written.rows,
            "tokens": None if tokens is None else {"median": tokens[0], "longest": tokens[1]},
            "is_estimate": written.is_estimate,
        }
        echo(json.dumps(facts, indent=2))
        return
    reason = " ".join(written.reason.split())  # which names columns
    echo(f"{written.path}: {recipe.task.name}, {recipe.adapter.method}, {reason}")
    say(f"next: lorakit preview {written.path}, then lorakit train {written.path}")


def _local_model() -> str | None:
    """The first model in the directory ``models``."""
    found = sorted(Path("models").glob("*/config.json"))
    return str(found[0].parent) if found else None


def _ask(what: str, default: str | None, use: Callable[[str], _T]) -> _T:
    """Ask on the terminal until ``use`` takes the answer, and return what it returns. Raises
    UserError at the end of the input."""
    while True:
        suffix = f" [{default}]" if default else ""
        typer.echo(printable(f"{what}: {_ANSWERS[what]}{suffix}: "), err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            say("")
            raise UserError(f"no answer for {what}; allowed: --{what}")
        if answer := line.strip() or default:
            try:
                return use(answer)
            except UserError as error:
                say(f"error: {error}")
