"""``inspect``: what an adapter has learned, as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lorakit.cli.console import AsJson, Subfolder, TrustRemoteCode, echo, in_subfolder, say

if TYPE_CHECKING:
    from lorakit.api import InspectReport, MatrixReport, Similarity

_Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter: directory or Hub id.")]
_Other = Annotated[
    str | None,
    typer.Argument(metavar="OTHER", help="Another adapter, to compare subspaces with."),
]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Base model, directory or Hub id: also compute the amplification."
    ),
]
_Side = Annotated[
    str,
    typer.Option(
        metavar="right|left",
        help="Compare right-singular vectors of A (right), or left ones of B (left).",
    ),
]
_Plot = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Draw ranks, norms and similarity as PNG and SVG into DIR."),
]

#: Up to this many matrices have a line each; more are grouped by role.
_MOST_LINES = 40
_BARS = "▁▂▃▄▅▆▇█"
_Value = Callable[["MatrixReport"], "float | None"]


def inspect(
    adapter: _Adapter,
    other: _Other = None,
    base: _Base = None,
    side: _Side = "right",
    plot: _Plot = None,
    subfolder: Subfolder = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show ranks and norms of an adapter, or compare two.

    For each matrix: the rank, the effective rank, and the norms of A, B and of the update as it is
    added to W; with --base, how much the update amplifies directions that W does not emphasize.
    With OTHER: how similar the subspaces of the two adapters are, compared with those of random
    matrices. Works for LoRA, LoRA+, AdaLoRA, DoRA (without its magnitudes) and MoSLoRA, and for
    adapters of PEFT.

    Example: lorakit inspect runs/chat/adapter --base Qwen/Qwen3-8B

    Example: lorakit inspect runs/chat/adapter runs/sql/adapter --plot figures
    """
    from lorakit.api import inspect as inspect_adapter

    report = inspect_adapter(
        in_subfolder(adapter, subfolder), other, base=base,
        side=cast(Literal["right", "left"], side), plot=plot,
        trust_remote_code=trust_remote_code, say=say,
    )  # fmt: skip
    if as_json:
        echo(json.dumps(dataclasses.asdict(report), indent=2, allow_nan=False))
        return
    _print_report(report)
    if plot is not None:
        echo(f"figures are in {plot}")


def _print_report(report: InspectReport) -> None:
    from lorakit.api import aligned

    modules = report.modules
    base = f", base {report.base}" if report.base else ""
    echo(f"{report.adapter}: {report.method}, {len(modules)} matrices{base}")
    columns: dict[str, _Value] = {
        "r": lambda m: m.r,
        "eff. rank": lambda m: m.effective_rank,
        "|A|": lambda m: m.norm_A,
        "|B|": lambda m: m.norm_B,
        "|dW|": lambda m: m.norm_delta,
    }
    if any(m.amplification is not None for m in modules):
        columns["amplification"] = lambda m: m.amplification
    if len(modules) <= _MOST_LINES:
        lines = [[m.module, *(_number(value(m)) for value in columns.values())] for m in modules]
        echo(aligned([["matrix", *columns], *lines]))
    else:
        groups = _by_role(modules)
        lines = [
            [f"{role} ({len(own)})", *(_spread([v(m) for m in own]) for v in columns.values())]
            for role, own in groups.items()
        ]
        echo("mean (minimum to maximum) by role:")
        echo(aligned([["role", *columns], *lines]))
    if report.method == "adalora":
        echo(_rank_map(modules))
    if report.similarity is not None:
        _print_similarity(report.similarity, modules)


def _print_similarity(similarity: Similarity, modules: Sequence[MatrixReport]) -> None:
    """phi of the first directions and of all, each beside that of random matrices."""
    from lorakit.api import aligned

    side = "right-singular vectors of A" if similarity.side == "right" else (
        "left-singular vectors of B"
    )  # fmt: skip
    echo(f"similarity to {similarity.other}, {side} (1: same subspace; in brackets: random):")
    roles = {m.module: m.role for m in modules}
    many = len(similarity.modules) > _MOST_LINES
    groups: dict[str, list[list[float]]] = {}
    for m in similarity.modules:
        if m.phi and m.phi[0]:
            values = [m.phi[0][0], m.control_phi[0][0], m.phi[-1][-1], m.control_phi[-1][-1]]
            groups.setdefault(roles[m.module] if many else m.module, []).append(values)
    lines = []
    for name, rows in groups.items():
        first, first_random, every, every_random = (
            sum(v) / len(v) for v in zip(*rows, strict=True)
        )
        label = f"{name} (mean of {len(rows)})" if many else name
        lines.append(
            [label, f"{first:.3f} ({first_random:.3f})", f"{every:.3f} ({every_random:.3f})"]
        )
    echo(aligned([["role" if many else "matrix", "phi(1, 1)", "phi of all"], *lines]))


def _by_role(modules: Sequence[MatrixReport]) -> dict[str, list[MatrixReport]]:
    groups: dict[str, list[MatrixReport]] = {}
    for m in modules:
        groups.setdefault(m.role, []).append(m)
    return groups


def _rank_map(modules: Sequence[MatrixReport]) -> str:
    """A bar for each layer of each role; a space where the layer has no such matrix."""
    from lorakit.api import aligned

    layers = sorted({m.layer for m in modules if m.layer is not None})
    most = max(1, *(m.r for m in modules), 1)
    lines = []
    for role, own in _by_role(modules).items():
        ranks = {m.layer: m.r for m in own}
        bars = [
            " " if layer not in ranks else "·" if not ranks[layer] else
            _BARS[(ranks[layer] * len(_BARS) - 1) // most]
            for layer in layers
        ]  # fmt: skip
        lines.append([role, "".join(bars), f"{sum(ranks.values()) / len(ranks):.1f}"])
    span = f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
    return f"ranks (· 0, {_BARS[-1]} {most}):\n" + aligned([["role", span, "mean"], *lines])


def _spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean, least, most = sum(found) / len(found), min(found), max(found)
    same = least == most
    return _number(mean) if same else f"{_number(mean)} ({_number(least)} to {_number(most)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
