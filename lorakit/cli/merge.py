"""``lorakit merge``: fold an adapter into its base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.errors import listed

if TYPE_CHECKING:
    from lorakit.adapters.merge import MergeReport
    from lorakit.adapters.merge_files import LeftOut


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

    from lorakit.adapters.merge import merge as merge_adapter
    from lorakit.cli.progress import progress, say

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
