"""``lorakit convert``: one adapter in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
