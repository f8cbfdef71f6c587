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
from lorakit.errors import UserError, file_size

if TYPE_CHECKING:
    from lorakit.api import HubTarget

_Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="Adapter or model: directory or Hub id.")
]
_Out = Annotated[Path | None, typer.Argument(metavar="OUT.gguf", help="File to write.")]
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
        metavar="MODEL",
        help="Base model of the adapter [default: the one it names]; with hub, its name there.",
    ),
]
_Repo = Annotated[
    str | None, typer.Option(metavar="NAMESPACE/NAME", help="With hub: the repository to push to.")
]
_Check = Annotated[
    str | None,
    typer.Option("--check", metavar="vllm", help="Check whether vLLM can load the adapter."),
]
_MaxLoraRank = Annotated[
    int | None,
    typer.Option(
        "--max-lora-rank",
        metavar="R",
        help="With --check: the value that vLLM is started with [default: the smallest that fits].",
    ),
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
    check: _Check = None,
    max_lora_rank: _MaxLoraRank = None,
    as_json: AsJson = False,
) -> None:
    """Export an adapter or a model for other programs.

    gguf: one file for llama.cpp and Ollama, of a model (as merge writes it) or of a LoRA adapter,
    which llama.cpp applies to its base. Requires the package gguf (extra gguf).

    hub: a repository on the Hugging Face Hub, with the files of an adapter or a model only.

    --check vllm writes nothing: it checks an adapter against vLLM's rules, says what to run for
    each that fails, and exits with 1 if any failed.

    Example: lorakit export merged merged.gguf --to gguf --dtype q8_0

    Example: lorakit export runs/quickstart/adapter adapter.gguf --to gguf

    Example: lorakit export runs/sql/adapter --to hub --repo me/sql

    Example: lorakit export runs/sql/adapter --check vllm
    """
    source = in_subfolder(source, subfolder)
    given = {
        "OUT.gguf": out, "--dtype": dtype, "--repo": repo, "--private": private or None,
        "--revision": revision, "--max-lora-rank": max_lora_rank, "--to": to or None,
    }  # fmt: skip
    if check is not None:
        _check_given(f"--check {check}", given, ("--max-lora-rank",))
        _check(source, check, base, max_lora_rank, as_json)
    elif to == "gguf":
        _check_given("--to gguf", given, ("--to", "OUT.gguf", "--dtype"), "OUT.gguf")
        _export_gguf(source, Path(out or ""), dtype, base, overwrite, as_json)
    elif to == "hub":
        _check_given("--to hub", given, ("--to", "--repo", "--private", "--revision"), "--repo")
        target = target_of(repo, private, revision, overwrite, "--repo")
        assert target is not None
        _push(source, target, base, as_json)
    else:
        raise UserError(
            f"--to = {to}: allowed: gguf, hub" if to else "--to is missing; allowed: gguf, hub"
        )


def _check_given(
    mode: str, given: Mapping[str, object], allowed: Sequence[str], needed: str | None = None
) -> None:
    """Raise UserError for an option that is not ``allowed``, or without the ``needed`` one."""
    for name, value in given.items():
        if value is not None and name not in allowed:
            shown = name if value is True else f"{name} {value}"
            raise UserError(f"{shown}: not allowed with {mode}")
    if needed is not None and given[needed] is None:
        raise UserError(f"{mode}: {needed} is missing")


def _check(
    source: Path, check: str, base: str | None, max_lora_rank: int | None, as_json: bool
) -> None:
    from lorakit.api import check_vllm

    if check != "vllm":
        raise UserError(f"--check = {check}: allowed: vllm")
    report = check_vllm(source, base=base, max_lora_rank=max_lora_rank, say=say)
    if as_json:
        echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    else:
        for rule in report.rules:
            echo(f"{rule.status:<8}{rule.rule}: {rule.found}" + _advice(rule.run))
        echo(report.serve or f"{report.adapter}: vLLM cannot serve it as it is")
    if not report.ok:
        raise typer.Exit(1)


def _advice(run: str | None) -> str:
    return f"; hint: {run}" if run else ""


def _push(source: Path, target: HubTarget, base: str | None, as_json: bool) -> None:
    from lorakit.api import push_to_hub

    with option_named("--repo", target.repo):
        report = push_to_hub(
            source, target.repo, private=target.private, revision=target.revision, base=base,
            overwrite=target.overwrite, say=say,
        )  # fmt: skip
    if as_json:
        echo(json.dumps(dataclasses.asdict(report), indent=2))
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
        echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    else:
        echo(
            f"{report.path}: {report.kind}, {report.tensors} tensors, {report.dtype}; "
            f"{file_size(report.size_bytes)}"
        )
