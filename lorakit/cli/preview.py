"""``lorakit preview``: what the model will see, and what of it is trained."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.output import progress, say

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.api import DescribedRow, Piece, Preview

_OPEN, _CLOSE, _BREAK = "⟦", "⟧", "⏎"
#: Joiners shape the letters of some scripts, and emoji: they are text, not commands.
_JOINERS = "\u200c\u200d"


def preview(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file.")],
    split: Annotated[str, typer.Option(metavar="S", help="Split.")] = "train",
    count: Annotated[int, typer.Option(metavar="N", min=0, help="Rows to show.")] = 3,
    start: Annotated[int, typer.Option(metavar="K", min=1, help="The first of them.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Take the split's first N rows [default: all]."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="No colours: trained text stands in marks.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value, read as YAML."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show rows as the model will see them, tokens by trained or masked, and a split's figures.

    No weights are loaded. Colours need a terminal; elsewhere, and where NO_COLOR is set, trained
    text stands between ⟦ and ⟧. Control characters of the data are escaped.

    Example: lorakit preview recipes/quickstart.yaml --split validation --count 5
    """
    from lorakit.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides)

    from lorakit.api import preview as make_preview

    with progress("tokenised") as report:
        found = make_preview(
            resolved, split=split, start=start, count=count, limit=limit, on_progress=report,
            say=say,
        )  # fmt: skip
    _print_json(found) if as_json else _print(found, plain)
    if endless := found.summary.endless_rows:
        say(
            f"warning: {endless:,} of {found.training_rows:,} rows do not end in a trained "
            "EOS: nothing there teaches the model to stop"
        )


def _print_json(found: Preview) -> None:
    import json

    summary = {**vars(found.summary), "trained_share": found.summary.trained_share}
    result = {
        "task": found.task,
        "split": found.split,
        "labels": found.labels,
        "label_counts": found.label_counts,
        "examples": [_example(row, found.labels) for row in found.examples],
        "summary": summary,
        "training_rows": found.training_rows,
    }
    typer.echo(json.dumps(result))


def _example(row: DescribedRow, labels: list[str] | None) -> dict[str, Any]:
    return {
        "row": row.where,
        "text": "".join(piece.text for piece in row.pieces),
        "ids": row.ids,
        "tokens": row.tokens,
        "trained": row.trained,
        "truncated": row.truncated,
        "cut": row.cut,
        "label": _label(row, labels),
        "part": row.part,
    }


def _label(row: DescribedRow, labels: list[str] | None) -> str | float | None:
    return labels[int(row.label)] if labels is not None and row.label is not None else row.label


def _print(found: Preview, plain: bool) -> None:
    """Text on stdout; a character that its encoding lacks is escaped."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    plain = plain or console.no_color or console.color_system is None
    _print_line(console, plain, _header(found, plain))
    for row in found.examples:
        _print_line(console, plain, [(f"\n--- {_escaped(_about(row))}", "bold")])
        _print_line(console, plain, _body(row, plain))
        if (label := _label(row, found.labels)) is not None:
            shown = _escaped(f"{label:g}" if isinstance(label, (int, float)) else label)
            _print_line(console, plain, [("label: ", ""), (shown, "green")])
    lines = "".join(f"\n{name:22} {value}" for name, value in _figures(found))
    _print_line(console, plain, [(lines, "")])


def _print_line(console: Console, plain: bool, parts: list[tuple[str, str]]) -> None:
    if plain:
        typer.echo("".join(text for text, _ in parts))
        return
    from rich.text import Text

    console.print(Text.assemble(*parts))


def _header(found: Preview, plain: bool) -> list[tuple[str, str]]:
    shown = sum(row.part[0] == 1 for row in found.examples)
    title = f"{_escaped(found.task)}, {_escaped(found.split)}: {shown:,} of "
    title += f"{found.summary.rows:,} rows; {_BREAK} is a line break; "
    if found.summary.trained_tokens is None:
        return [(title + "the loss is on the label", "")]
    if plain:
        return [(f"{title}the loss is taken on what is inside {_OPEN} {_CLOSE}", "")]
    return [(title, ""), ("trained", "green"), (", ", ""), ("masked", "dim"), (", ", ""),
            ("special token", "bold")]  # fmt: skip


def _about(row: DescribedRow) -> str:
    part, parts = row.part
    text = row.where + (f", training row {part} of {parts}" if parts > 1 else "")
    text += f": {len(row.ids):,} tokens"
    if row.label is None:
        text += f", {sum(row.trained):,} trained"
    if row.truncated:
        text += "; truncated" + (", the end and its EOS are lost" if row.cut else "")
    return text


def _body(row: DescribedRow, plain: bool) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    inside = False
    for piece in row.pieces:
        if plain and piece.trained != inside:
            parts.append((_CLOSE if inside else _OPEN, ""))
            inside = piece.trained
        parts.append((_escaped(piece.text), _style(piece, row)))
    return [*parts, (_CLOSE, "")] if inside else parts


def _style(piece: Piece, row: DescribedRow) -> str:
    colour = "" if row.label is not None else "green" if piece.trained else "dim"
    return f"bold {colour}".strip() if piece.special else colour


def _escaped(text: str) -> str:
    """One line break a line feed, each with its mark; what steers a terminal, is invisible, or is
    one of the marks in hexadecimal."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\n":
        return f"{_BREAK}\n"
    if character == "\t":
        return "\\t"
    visible = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if (visible or character in _JOINERS) and character not in (_OPEN, _CLOSE):
        return character
    return character.encode("unicode-escape", "backslashreplace").decode("ascii")


def _figures(found: Preview) -> list[tuple[str, str]]:
    """Names and values, a line each."""
    from lorakit.tasks.checks import counts_line

    summary = found.summary
    span = f"{summary.min_length:,} to {summary.max_length:,}"
    more = found.training_rows != summary.rows
    split_rows = [("training rows", f"{found.training_rows:,}")] if more else []
    figures = [
        ("rows", f"{summary.rows:,}"),
        *split_rows,
        *([("labels", _escaped(counts_line(found.label_counts)))] if found.label_counts else []),
        ("tokens", f"{summary.tokens:,}"),
        ("tokens a row", f"{span}, {summary.mean_length:,.1f} on average"),
    ]
    if summary.trained_tokens is not None:
        share = f"{summary.trained_tokens:,} ({summary.trained_share:.1%})"
        figures.append(("trained tokens", share))
    figures.append(("truncated rows", f"{summary.truncated_rows:,} (to {found.limit:,} tokens)"))
    if summary.cut_completions is not None:
        figures.append(("lost their end and EOS", f"{summary.cut_completions:,}"))
    if summary.bins is not None:
        bins = f"{summary.bins:,} of {found.limit:,} tokens, {summary.bin_fill:.1%} full"
        figures.append(("bins of packed rows", bins))
    return figures
