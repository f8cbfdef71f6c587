"""How far a command is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import typer

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
