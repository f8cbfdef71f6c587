"""``export``: adapters and models for other programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.console import (
    AsJson,
    Subfolder,
    echo,
    in_subfolder,
    option_named,
    progress,
    say,
)
from lorakit.cli.hub import Private, Revision, pushed_line, target_of
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.api import HubTarget

_Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Adapter or model: directory or Hub id.")
]
_Out = Annotated[Path | None, typer.Argument(metavar="[OUT.gguf]", help="File to write.")]
_Target = Annotated[str, typer.Option("--to", metavar="TARGET", help="gguf or hub.")]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="f32, f16, bf16 or q8_0 [default: that of the model's weights; f32 for an adapter].",
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="Base model of the adapter [default: the one it names]; with hub, what to call it.",
    ),
]
_Repo = Annotated[
    str | None, typer.Option(metavar="NAMESPACE/NAME", help="With hub: the repository to push to.")
]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT.gguf, or all files of the repository."),
]


def export(
    source: _Source,
    out: _Out = None,
    to: _Target = "",
    dtype: _Dtype = None,
    base: _Base = None,
    repo: _Repo = None,
    private: Private = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    overwrite: _Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Export an adapter or a model for other programs.

    gguf: one file for llama.cpp and Ollama, of a model (as merge writes it) or of a LoRA adapter,
    which llama.cpp applies to its base. Requires the package gguf (extra gguf).

    hub: a repository on the Hugging Face Hub, with the files of an adapter or a model only.

    Example: lorakit export merged merged.gguf --to gguf --dtype q8_0

    Example: lorakit export runs/quickstart/adapter adapter.gguf --to gguf

    Example: lorakit export runs/sql/adapter --to hub --repo me/sql
    """
    source = in_subfolder(source, subfolder)
    given = {
        "OUT.gguf": out, "--dtype": dtype, "--repo": repo, "--private": private or None,
        "--revision": revision,
    }  # fmt: skip
    if to == "gguf":
        _check_given(to, given, ("OUT.gguf", "--dtype"), "OUT.gguf")
        _export_gguf(source, Path(out or ""), dtype, base, overwrite, as_json)
    elif to == "hub":
        _check_given(to, given, ("--repo", "--private", "--revision"), "--repo")
        target = target_of(repo, private, revision, overwrite, "--repo")
        assert target is not None
        _push(source, target, base, as_json)
    else:
        raise UserError(
            f"--to = {to}: allowed: gguf, hub" if to else "--to is missing; allowed: gguf, hub"
        )


def _check_given(to: str, given: Mapping[str, object], allowed: Sequence[str], needed: str) -> None:
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise UserError(f"{name} = {value}: not with --to {to}")
    if given[needed] is None:
        raise UserError(f"--to {to}: {needed} is missing")


def _push(source: Path, target: HubTarget, base: str | None, as_json: bool) -> None:
    from lorakit.api import push_to_hub

    with option_named("--repo", target.repo):
        report = push_to_hub(
            source, target.repo, private=target.private, revision=target.revision, base=base,
            overwrite=target.overwrite, say=say,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        echo(pushed_line(report))


def _export_gguf(
    source: Path,
    out: Path,
    dtype: str | None,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from lorakit.api import export_gguf

    with progress("writing, MB") as report_progress:
        report = export_gguf(
            source, out, dtype, base=base, overwrite=overwrite, say=say,
            on_progress=lambda done, total: report_progress(done // 10**6, total // 10**6),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    else:
        echo(
            f"{report.path}: {report.kind}, {report.tensors} tensors, {report.dtype}; "
            f"{report.size_bytes / 1e6:,.1f} MB"
        )
