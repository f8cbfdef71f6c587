"""The options of commands that push to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import UserError, counted, file_size

if TYPE_CHECKING:
    from lorakit.api import HubTarget, PushReport

PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="NAMESPACE/NAME",
        help="Upload the result to this repository on the Hub; checked before work starts.",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make a new repository on the Hub private.")
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="BRANCH", help="Branch on the Hub to push to [default: main]."
    ),
]


def target_of(
    push: str | None, private: bool, revision: str | None, overwrite: bool, option: str
) -> HubTarget | None:
    """Where to push. Raises UserError for ``--private`` or ``--revision`` without ``option``, which
    names the repository."""
    if push is not None:
        from lorakit.api import HubTarget

        return HubTarget(push, private, revision, overwrite)
    for name, given in (("--private", private), ("--revision", revision is not None)):
        if given:
            raise UserError(f"{name}: requires {option} NAMESPACE/NAME")
    return None


def push_options(repo: str | None, private: bool, revision: str | None) -> list[str]:
    """The options that push what was trained, as they were given."""
    options = [] if repo is None else ["--push-to-hub", repo]
    options += ["--private"] if private else []
    return options + ([] if revision is None else ["--revision", revision])


def pushed_line(report: PushReport) -> str:
    """Where an upload can be seen, and what it contains."""
    return f"{report.url}: {counted(len(report.files), 'file')}, {file_size(report.size_bytes)}"
