"""``merge`` and ``convert``: commands on adapter directories."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.console import (
    AsJson,
    Overwrite,
    Subfolder,
    TrustRemoteCode,
    echo,
    in_subfolder,
    only_results,
    option_named,
    progress,
    say,
)
from lorakit.cli.hub import Private, PushToHub, Revision, pushed_line, target_of
from lorakit.errors import counted, file_size, listed

if TYPE_CHECKING:
    from lorakit.api import LeftOut, MergeReport

_Base = Annotated[str, typer.Argument(metavar="BASE", help="Base model: directory or Hub id.")]
_Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter: directory or Hub id.")]
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")]
_Add = Annotated[
    list[str] | None,
    typer.Option(
        "--add",
        metavar="OTHER[:W]",
        help="Also add W times the update of another adapter [default: 1]. Can be repeated.",
    ),
]
_Weight = Annotated[float, typer.Option(metavar="W", help="Multiply ADAPTER's update by W.")]
_Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME|FILE.py:CLASS",
        help="How to combine the adapters, with PEFT's names: cat (the sum, default), linear, svd, "
        "ties, dare_linear (dare), dare_ties, magnitude_prune. Or your own method, if the adapter "
        "was trained with one; the file is run.",
    ),
]
_Density = Annotated[
    float | None,
    typer.Option(metavar="D", help="Share of values that ties, dare_* and magnitude_prune keep."),
]
_SvdRank = Annotated[
    int | None,
    typer.Option(metavar="R", help="Rank of svd [default: the largest of the adapters]."),
]
_SignMethod = Annotated[
    str | None,
    typer.Option(metavar="M", help="How *ties elect signs: total or frequency [default: total]."),
]
_Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Random seed of dare_* [default: 42].")
]
_Dtype = Annotated[
    str | None,
    typer.Option(metavar="D", help="float32, bfloat16 or float16 [default: that of the base]."),
]
_ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Maximum size of a weight file, e.g. 5GB or 200MB.")
]


def merge(
    base: _Base,
    adapter: _Adapter,
    out: _Out,
    add: _Add = None,
    weight: _Weight = 1.0,
    dtype: _Dtype = None,
    max_shard_size: _ShardSize = "5GB",
    overwrite: Overwrite = False,
    method: _Method = None,
    density: _Density = None,
    svd_rank: _SvdRank = None,
    majority_sign_method: _SignMethod = None,
    seed: _Seed = None,
    subfolder: Subfolder = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base model.

    Plain transformers loads the result. The sum is computed in float32 and rounded once. Tensors,
    settings and files of the base that the adapter does not change are copied; weights in other
    formats are skipped and listed. Fully trained modules, such as a classification head, are not
    weighted: they are taken from ADAPTER, and OTHER must have the same or none.

    Example: lorakit merge Qwen/Qwen3-8B runs/chat/adapter merged

    Example: lorakit merge BASE ADAPTER merged --add runs/other/adapter:0.5

    Example: lorakit merge BASE A merged --add B --method ties --density 0.5
    """
    from lorakit import api

    target = target_of(push_to_hub, private, revision, overwrite, "--push-to-hub")
    if target is not None:
        with option_named("--push-to-hub", target.repo):
            api.check_push(target, base, say)
    with only_results(), progress("merging, MB") as report_progress:
        report = api.merge(
            base, in_subfolder(adapter, subfolder), out, dtype, max_shard_size, overwrite,
            trust_remote_code, say=say, seed=seed,
            add=[_weighted(text) for text in add or []], weight=weight, method=method,
            density=density, svd_rank=svd_rank, majority_sign_method=majority_sign_method,
            on_progress=lambda done, total: report_progress(done // 10**6, total // 10**6),
        )  # fmt: skip
    pushed = None
    try:
        if target is not None:
            pushed = api.push_trained(report.directory, target, say, base)
    finally:
        if as_json:
            found = dataclasses.asdict(report) | ({"hub": pushed.url} if pushed else {})
            echo(json.dumps(found, indent=2, default=str))
        else:
            _print_report(report)
            if pushed is not None:
                echo(pushed_line(pushed))


def _print_report(report: MergeReport) -> None:
    replaced, count = report.replaced_tensors, len(report.files)
    echo(
        f"{report.directory}: {counted(report.merged_modules, 'module')} merged"
        + (f", {counted(replaced, 'tensor')} replaced" if replaced else "")
        + f"; {report.dtype}, {file_size(report.size_bytes)} in {counted(count, 'file')}"
        + (f"; weight {report.weight:g}" if report.weight != 1 else "")
        + (f"; combined by {report.combination}" if report.combination != "cat" else "")
        + "".join(f"; added {other.weight:g} x {other.adapter}" for other in report.added)
    )
    if report.kept:
        names = listed(report.kept, most=1)
        echo(f"copied from the base: {names} (not part of the model class that was trained)")
    for reason, names in _by_reason(report.left_out).items():
        echo(f"skipped: {names}: {reason}")


def _by_reason(left_out: Iterable[LeftOut]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for item in left_out:
        found.setdefault(item.reason, []).append(item.name)
    return {reason: listed(names, most=8) for reason, names in found.items()}


def _weighted(text: str) -> tuple[str, float]:
    """Split ``DIR:W``, unless the colon and number belong to the name of an existing directory."""
    directory, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon else 1.0
    except ValueError:
        return text, 1.0
    is_name = Path(text).is_dir() and not Path(directory).is_dir()
    return (directory, weight) if colon and not is_name else (text, 1.0)


_Source = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Adapter directory, or loralib checkpoint.")
]
_Target = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="Directory to write; for loralib a .safetensors file."),
]
_Format = Annotated[str, typer.Option("--to", metavar="FORMAT", help="lora, loralib or peft.")]
_Rank = Annotated[
    int | None,
    typer.Option(
        metavar="R", help="Rank for --to lora [default: the smallest that vLLM supports]."
    ),
]
_Alpha = Annotated[
    float | None,
    typer.Option(metavar="A", help="From loralib: lora_alpha used in training [default: 1]."),
]
_EnableLora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[MODULE=]PARTS",
        help="From loralib: the enabled projections of a MergedLinear, such as q,v or 1,0,1; "
        "MODULE= limits it to modules whose name ends with MODULE. Can be repeated.",
    ),
]
_Embedding = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="From loralib: modules whose name ends with NAME are embeddings, in addition to "
        "embed_tokens, wte, word_embeddings and similar. Can be repeated.",
    ),
]
_BaseModel = Annotated[
    str | None, typer.Option(metavar="NAME", help="From loralib: base model, directory or Hub id.")
]
_TaskType = Annotated[
    str | None, typer.Option(metavar="TYPE", help="From loralib: CAUSAL_LM, SEQ_CLS or TOKEN_CLS.")
]
_FanInFanOut = Annotated[
    bool,
    typer.Option("--fan-in-fan-out", help="From loralib: the base has Conv1D layers (GPT-2)."),
]


def convert(
    adapter: _Source,
    out: _Target,
    to: _Format,
    rank: _Rank = None,
    lora_alpha: _Alpha = None,
    enable_lora: _EnableLora = None,
    embedding: _Embedding = None,
    base_model: _BaseModel = None,
    task_type: _TaskType = None,
    fan_in_fan_out: _FanInFanOut = False,
    subfolder: Subfolder = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter to another format.

    The base model is needed only for PiSSA and OLoRA adapters of PEFT. The formats are:

    lora: plain LoRA of one rank, for PEFT and vLLM, from any LoRA, rsLoRA or AdaLoRA adapter.

    peft: a PEFT directory, from a loralib checkpoint; an adapter that PEFT can load is copied.

    loralib: one safetensors file with MODULE.lora_A and MODULE.lora_B, and in its metadata the r
    and lora_alpha of the layers.

    A loralib checkpoint is a .safetensors file, or a .pt, .pth or .bin file of torch.save, from
    which only tensors are loaded (weights_only); no code in it is run. Its biases and heads are
    kept.

    Example: lorakit convert runs/adalora/adapter plain --to lora

    Example: lorakit convert gpt2_lora.pt out --to peft --enable-lora q,v
    """
    from lorakit.api import convert as convert_adapter

    report = convert_adapter(
        in_subfolder(adapter, subfolder), out, to, rank=rank, lora_alpha=lora_alpha,
        enable_lora=enable_lora or (),
        embedding=embedding or (), base_model=base_model, task_type=task_type,
        fan_in_fan_out=fan_in_fan_out, overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        echo(json.dumps(dataclasses.asdict(report), indent=2, default=str))
        return
    settings = [_setting(name, getattr(report, name)) for name in ("r", "lora_alpha")]
    echo(
        f"{report.path}: {report.matrices} matrices as {report.to}"
        + "".join(f", {text}" for text in settings if text)
        + f"; {file_size(report.size_bytes)}"
    )


def _setting(name: str, value: float | dict[str, int] | dict[str, float] | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{name} = {value:g}"
    return f"{name} = {min(value.values()):g} to {max(value.values()):g}"
