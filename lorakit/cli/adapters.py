"""``lorakit merge``: fold an adapter into its base.

``lorakit convert``: one adapter in another form.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import listed

if TYPE_CHECKING:
    from lorakit.adapters.merge.files import LeftOut
    from lorakit.adapters.merge.run import MergeReport


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Base model: directory or Hub id.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="OTHER[:W]",
            help="Add W (default 1) times the update of another adapter; may be given again.",
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option(metavar="W", help="Factor of ADAPTER's own update.")
    ] = 1.0,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="D", help="float32, bfloat16 or float16 [default: the base's own]."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file, such as 5GB or 200MB.")
    ] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the base model brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fold an adapter into its base; plain transformers loads the result.

    The sum is taken in float32 and rounded once. Tensors, settings and files of the base that the
    adapter does not change are kept; weights in other formats are left out, and listed. Modules
    trained whole, such as a head, have no weight: they are ADAPTER's, and OTHER must have none, or
    the same.

    Example: lorakit merge models/smollm2-135m-instruct runs/quickstart/adapter merged

    Example: lorakit merge BASE ADAPTER merged --add runs/other/adapter:0.5
    """
    import dataclasses
    import json

    from lorakit.adapters.merge.run import merge as merge_adapter
    from lorakit.cli.output import progress, say

    with progress("merging, MB") as report_progress:
        report = merge_adapter(
            base, adapter, out, dtype, max_shard_size, overwrite, trust_remote_code, say=say,
            add=[_weighted(text) for text in add or []], weight=weight,
            on_progress=lambda done, total: report_progress(done // 10**6, total // 10**6),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    else:
        _print_report(report)


def _print_report(report: MergeReport) -> None:
    count = len(report.files)
    typer.echo(
        f"{report.directory}: {report.merged_modules} modules merged, {report.replaced_tensors} "
        f"tensors replaced; {report.dtype}, {report.size_bytes / 1e6:,.1f} MB in {count} "
        f"{'file' if count == 1 else 'files'}"
        + (f"; weight {report.weight:g}" if report.weight != 1 else "")
        + "".join(f"; added {other.weight:g} x {other.adapter}" for other in report.added)
    )
    if report.kept:
        typer.echo(
            f"kept unchanged: {listed(report.kept, most=1)}: not read by the class that was trained"
        )
    for reason, names in _by_reason(report.left_out).items():
        typer.echo(f"left out: {listed(names, most=8)}: {reason}")


def _by_reason(left_out: Iterable[LeftOut]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in left_out:
        found.setdefault(item.reason, []).append(item.name)
    return found


def _weighted(text: str) -> tuple[str, float]:
    """Directory and weight: what follows the last colon, if it is a number, and not the end of a
    directory's name."""
    directory, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon else 1.0
    except ValueError:
        return text, 1.0
    ends_so = Path(text).is_dir() and not Path(directory).is_dir()
    return (directory, weight) if colon and not ends_so else (text, 1.0)


def convert(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Adapter directory, or loralib checkpoint.")
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Directory to write; loralib: or a .safetensors file."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="lora, loralib or peft.")],
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="lora: its rank [default: the least of vLLM's that fits]."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="A", help="From loralib: the training's [default: 1, loralib's]."),
    ] = None,
    enable_lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODULE=]WHICH",
            help="From loralib: the enabled projections of a MergedLinear, as q,v or 1,0,1; with "
            "MODULE= of the modules whose names end so. May be given again.",
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="From loralib: modules whose names end so are embeddings, besides those named "
            "embed_tokens, wte, word_embeddings and the like. May be given again.",
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="From loralib: directory or Hub id.")
    ] = None,
    task_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="From loralib: CAUSAL_LM or SEQ_CLS.")
    ] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="From loralib: the base has Conv1D (GPT-2).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, if it is an adapter.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in another form; the base model is not needed.

    lora: a plain LoRA of one rank, for PEFT and vLLM, of any LoRA, rsLoRA or AdaLoRA.

    peft: a PEFT directory, of a loralib checkpoint; what PEFT loads already is copied.

    loralib: one safetensors file of MODULE.lora_A and MODULE.lora_B; its metadata has the r and
    lora_alpha that the layers need.

    A loralib checkpoint is .safetensors, or a .pt, .pth or .bin of torch.save, of which tensors
    alone are read (weights_only): no code in it is run. Biases and heads in it are kept.

    Example: lorakit convert runs/adalora/adapter plain --to lora

    Example: lorakit convert gpt2_lora.pt out --to peft --lora-alpha 32 --enable-lora q,v
    """
    import dataclasses
    import json

    from lorakit.adapters.convert import convert as convert_adapter

    report = convert_adapter(
        adapter, out, to, rank=rank, lora_alpha=lora_alpha, enable_lora=enable_lora or (),
        embedding=embedding or (), base_model=base_model, task_type=task_type,
        fan_in_fan_out=fan_in_fan_out, overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
        return
    settings = [_told(name, getattr(report, name)) for name in ("r", "lora_alpha")]
    typer.echo(
        f"{report.path}: {report.matrices} matrices as {report.to}"
        + "".join(f", {text}" for text in settings if text)
        + f"; {report.size_bytes / 1e6:,.1f} MB"
    )


def _told(name: str, value: float | dict[str, int] | dict[str, float] | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{name} = {value:g}"
    return f"{name} = {min(value.values()):g} to {max(value.values()):g}"
