"""``export``: adapters and models for other programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.console import AsJson, Overwrite, Subfolder, echo, in_subfolder, progress, say
from lorakit.errors import UserError

_Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Adapter or model: directory or Hub id.")
]
_Out = Annotated[Path | None, typer.Argument(metavar="[OUT.gguf]", help="File to write.")]
_Target = Annotated[str, typer.Option("--to", metavar="TARGET", help="gguf.")]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="f32, f16, bf16 or q8_0 [default: that of the model's weights; f32 for an adapter].",
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(metavar="BASE", help="Base model of the adapter [default: the one it names]."),
]


def export(
    source: _Source,
    out: _Out = None,
    to: _Target = "",
    dtype: _Dtype = None,
    base: _Base = None,
    subfolder: Subfolder = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Export an adapter or a model for other programs.

    gguf: one file for llama.cpp and Ollama, of a model (as merge writes it) or of a LoRA adapter,
    which llama.cpp applies to its base. Requires the package gguf (extra gguf).

    Example: lorakit export merged merged.gguf --to gguf --dtype q8_0

    Example: lorakit export runs/quickstart/adapter adapter.gguf --to gguf
    """
    if to != "gguf":
        raise UserError(f"--to = {to}: allowed: gguf" if to else "--to is missing; allowed: gguf")
    _export_gguf(in_subfolder(source, subfolder), out, dtype, base, overwrite, as_json)


def _export_gguf(
    source: Path,
    out: Path | None,
    dtype: str | None,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from lorakit.api import export_gguf

    if out is None:
        raise UserError("--to gguf: OUT.gguf is missing")
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
