"""``lorakit methods``: what ``adapter.method`` may be."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli.table import print_names


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the methods that adapter.method may name.

    Example: lorakit methods --json
    """
    from lorakit import registry

    print_names({name: method.summary for name, method in registry.methods().items()}, as_json)
