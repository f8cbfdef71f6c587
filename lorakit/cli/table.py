"""Names and their summaries on stdout."""

from __future__ import annotations

from collections.abc import Mapping

import typer


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
