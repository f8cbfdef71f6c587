"""``lorakit tasks``: what ``task.name`` may be."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.table import print_names


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the tasks that task.name may name.

    It may also name a file of your own, ./FILE.py:CLASS or ./FILE.yaml: see docs/own-task.md.

    Example: lorakit tasks --json
    """
    from lorakit import registry

    print_names({name: task.summary for name, task in registry.tasks().items()}, as_json)
    if not as_json:
        typer.echo("or a file of your own: ./FILE.py:CLASS, ./FILE.yaml", err=True)
