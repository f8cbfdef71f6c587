"""What the commands share: common options, notes and progress on stderr, output files.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lorakit.errors import UserError, WriteFailed, check_printable, printable
from lorakit.notes import to_stderr

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key. Can be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="Load the model as float32, bfloat16 or float16 [default: as in training, else the "
        "checkpoint's].",
    ),
]
MethodFile = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="FILE.py:CLASS",
        help="Your own method, if the adapter was trained with one; the file is run.",
    ),
]
Subfolder = Annotated[
    str | None,
    typer.Option(
        metavar="S", help="Folder of the adapter inside its directory or repository on the Hub."
    ),
]

OnProgress = Callable[[int, int], None]
OnPhase = Callable[[str, int, int], None]


def say(text: str) -> None:
    """Print a line on stderr, without what would control a terminal."""
    to_stderr(text)


def echo(text: str) -> None:
    """Print a result on stdout, without what would control a terminal."""
    try:
        typer.echo(printable(text))
    except BrokenPipeError:  # its reader has seen enough
        raise
    except OSError as error:
        problem = f"stdout: cannot be written: {error.strerror}"
        raise WriteFailed(problem, hint="redirect it to another file") from error


@contextmanager
def only_results() -> Iterator[None]:
    """Send what a user's task or method prints to stderr: stdout is for the command's result."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """Yield a callback ``(done, total)`` that reports the progress of one phase."""
    with phases() as report:
        yield partial(report, what)


@contextmanager
def phases() -> Iterator[OnPhase]:
    """Yield a callback ``(phase, done, total)``: a bar on a terminal, else occasional lines."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        from lorakit.api import progress_lines

        yield progress_lines(say)


@contextmanager
def _bar() -> Iterator[OnPhase]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from lorakit.api import ProgressBar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with ProgressBar(*columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def check_exclusive(given: Mapping[str, bool]) -> None:
    """Raise UserError if more than one of the options is given."""
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are mutually exclusive; allowed: one of them")


def check_writable(option: str, path: Path | None) -> None:
    """Raise UserError, before any work is done, if a file cannot be written to ``path``."""
    if path is None:
        return
    check_printable(path, option)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; allowed: a file")
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: no write permission")
        return
    path = path.resolve() if path.is_symlink() else path
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: no write permission in {path.parent}")


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[Path, str]) -> None:
    """Raise UserError if an output is one of the ``inputs`` (path -> description) or another
    output. Devices and pipes may be named more than once."""
    taken = {path.resolve(): what for path, what in inputs.items()}
    for option, path in outputs.items():
        if path is None or _is_stream(path):
            continue
        if (what := taken.get(path.resolve())) is not None:
            raise UserError(f"{option} {path}: is {what}; allowed: another file")
        taken[path.resolve()] = f"the file of {option}"


def _is_stream(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe or a socket."""
    return path.exists() and not path.is_file()


def in_subfolder(adapter: str | Path, subfolder: str | None) -> Path:
    """The adapter in ``subfolder`` of a directory or Hub id."""
    if subfolder is None:
        return Path(adapter)
    return Path(adapter, subfolder) if Path(adapter).is_dir() else Path(f"{adapter}:{subfolder}")


def model_and_adapter(
    model: str, adapter: Path | None, subfolder: str | None
) -> tuple[str, Path | None]:
    """Apply ``subfolder`` to the adapter, or to ``model`` if that is the adapter."""
    if adapter is None:
        return (str(in_subfolder(model, subfolder)) if subfolder else model), None
    return model, in_subfolder(adapter, subfolder)


@contextmanager
def option_named(option: str, value: object) -> Iterator[None]:
    """Start an error that begins with an option's value with the option itself."""
    try:
        yield
    except UserError as error:
        if value is not None and str(error).startswith(str(value)):
            error.args = (f"{option} {error}",)
        raise


def write_output(path: Path, text: str) -> None:
    """Write a file atomically, through symbolic links; write directly to a device or a pipe."""
    from lorakit.api import write_text

    if _is_stream(path):
        path.write_text(text, encoding="utf-8", newline="\n")
    else:
        write_text(path.resolve() if path.is_symlink() else path, text)
