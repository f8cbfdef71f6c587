"""``report`` and ``compare``: what runs did, as a page and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.console import AsJson, check_exclusive, echo, say
from lorakit.errors import UserError

_Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN", help="Run directories; a sweep directory stands for all its members."
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.html",
        help="Where to write the page [default: RUN/report.html].",
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace FILE.html even if it is not a report.")
]
_NoSamples = Annotated[
    bool, typer.Option("--no-samples", help="Leave out predictions, and with them rows of data.")
]
_Serve = Annotated[
    bool, typer.Option("--serve", help="Serve the page on 127.0.0.1 and keep it up to date.")
]
_Port = Annotated[
    int | None, typer.Option(metavar="N", min=0, max=65535, help="Port of --serve [default: 8765].")
]
_DEFAULT_PORT = 8765


def report(
    runs: _Runs,
    output: _Output = None,
    overwrite: _Overwrite = False,
    no_samples: _NoSamples = False,
    serve: _Serve = False,
    port: _Port = None,
) -> None:
    """Write an HTML report on one or more runs.

    The page has curves, results, predictions, recipes and differences, in one HTML file that needs
    no network. A run need not be complete. With --serve, nothing is written, and the page follows
    the runs while they go on.

    Example: lorakit report runs/quickstart

    Example: lorakit report runs/lora runs/adalora --output comparison.html
    """
    from lorakit import api

    if not serve:
        if port is not None:
            raise UserError(f"--port {port}: requires --serve")
        echo(str(api.report(*runs, output=output, overwrite=overwrite, samples=not no_samples)))
        if len(runs) > 1 and output is None:
            say("written to the first run's directory; --output FILE.html names another file")
        return
    check_exclusive({"--serve": True, "--output": output is not None})
    check_exclusive({"--serve": True, "--overwrite": overwrite})
    chosen = _DEFAULT_PORT if port is None else port
    with api.report_server(*runs, port=chosen, samples=not no_samples) as server:
        echo(server.url)
        say("press Ctrl-C to stop")
        server.serve()


def compare(runs: _Runs, as_json: AsJson = False) -> None:
    """Compare the results and the settings of runs.

    Example: lorakit compare runs/lora runs/adalora

    Example: lorakit compare runs/table6 --json
    """
    from lorakit import api

    compared = api.compare(*runs)
    for note in compared.notes:
        say(f"warning: {note}")
    if as_json:
        echo(json.dumps(compared.as_json(), indent=2, allow_nan=False))
    else:
        echo(api.comparison_text(compared))
