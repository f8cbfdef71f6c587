"""How far a command is, on stderr: a bar on a terminal, a plain line now and then elsewhere.

Files that a command writes for the user.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import typer

from lorakit.errors import UserError
from lorakit.io import atomic

OnProgress = Callable[[int, int], None]
OnPhase = Callable[[str, int, int], None]

_SECONDS_PER_LINE = 10.0


def say(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """A callback that takes rows done and rows in all."""
    with phases() as report:
        yield partial(report, what)


@contextmanager
def phases() -> Iterator[OnPhase]:
    """A callback that takes what is being done, rows done and rows in all."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[OnPhase]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> OnPhase:
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _SECONDS_PER_LINE:
            last = time.monotonic()
            say(f"{what} {done}/{total}")

    return report


def check_writable(option: str, path: Path | None) -> None:
    """Raise UserError, before any work is done, if ``path`` cannot become a file."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; allowed: a file")
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{option} {path}: no permission to write")
        return
    path = path.resolve() if path.is_symlink() else path
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the directory {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: no permission to write in {path.parent}")


def check_distinct(outputs: Mapping[str, Path | None], inputs: Mapping[Path, str]) -> None:
    """Raise UserError if an output is a file of ``inputs`` (path -> what it is) or another
    output; devices and pipes may be named twice."""
    taken = {path.resolve(): what for path, what in inputs.items()}
    for option, path in outputs.items():
        if path is None or _is_stream(path):
            continue
        if (what := taken.get(path.resolve())) is not None:
            raise UserError(f"{option} {path}: is {what}; allowed: another file")
        taken[path.resolve()] = f"the file of {option}"


def _is_stream(path: Path) -> bool:
    """A device, a pipe or a socket: written into, never replaced."""
    return path.exists() and not path.is_file()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. A symbolic link is kept and its target replaced; devices and
    pipes are written to directly."""
    if _is_stream(path):
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    atomic.write_text(path.resolve() if path.is_symlink() else path, text)
