"""``lorakit tasks``: what ``task.name`` may be."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.table import print_names


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the tasks that task.name may name.

    Example: lorakit tasks --json
    """
    from lorakit import registry

    print_names({name: task.summary for name, task in registry.tasks().items()}, as_json)
