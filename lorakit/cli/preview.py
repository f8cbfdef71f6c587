"""``preview``: the tokens that the model will see, and which of them are trained."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.console import AsJson, Overrides, RecipeFile, echo, only_results, progress, say
from lorakit.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.api import DescribedRow, Piece, Preview

_OPEN, _CLOSE, _BREAK = "⟦", "⟧", "⏎"
#: Zero-width joiners shape the letters of some scripts and emoji, so they are not escaped.
_JOINERS = "\u200c\u200d"

_Split = Annotated[str, typer.Option(metavar="S", help="Split to show.")]
_Count = Annotated[int, typer.Option(metavar="N", min=0, help="Number of rows to show.")]
_Start = Annotated[int, typer.Option(metavar="K", min=1, help="First row to show.")]
_Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Read only the first N rows [default: all]."),
]
_Plain = Annotated[
    bool, typer.Option("--plain", help="Mark trained text with brackets instead of colors.")
]


def preview(
    recipe: RecipeFile,
    split: _Split = "train",
    count: _Count = 3,
    start: _Start = 1,
    limit: _Limit = None,
    plain: _Plain = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will see them.

    Prints trained and masked tokens and statistics of the split; no model is loaded. Without a
    terminal, or if NO_COLOR is set, trained text is enclosed in ⟦ and ⟧. Control characters in the
    data are escaped.

    Example: lorakit preview recipes/quickstart.yaml --split validation
    """
    from lorakit.api import preview as make_preview
    from lorakit.recipe.load import open_recipe

    with (
        only_results(),
        open_recipe(recipe, overrides, say) as resolved,
        progress("tokenized") as report,
    ):
        found = make_preview(
            resolved, split=split, start=start, count=count, limit=limit, on_progress=report,
            say=say,
        )  # fmt: skip
    _print_json(found) if as_json else _print(found, plain)


def _print_json(found: Preview) -> None:
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
    echo(json.dumps(result))


def _example(row: DescribedRow, labels: list[str] | None) -> dict[str, Any]:
    return {
        "row": row.where,
        "text": "".join(piece.text for piece in row.pieces),
        "ids": row.input_ids,
        "tokens": row.tokens,
        "trained": row.loss_mask,
        "truncated": row.truncated,
        "cut": row.cut,
        "label": _label(row, labels),
        "part": row.part,
    }


def _label(row: DescribedRow, labels: list[str] | None) -> str | float | list[str] | None:
    if labels is None or row.label is None:
        assert not isinstance(row.label, tuple), "several labels are classes"
        return row.label
    if isinstance(row.label, tuple):
        return [labels[index] for index in row.label]
    return labels[int(row.label)]


def _label_text(label: str | float | list[str]) -> str:
    if isinstance(label, list):
        return ", ".join(label) or "none"
    return f"{label:g}" if isinstance(label, (int, float)) else label


def _print(found: Preview, plain: bool) -> None:
    """Print text on stdout; characters that its encoding lacks are escaped."""
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
            name = "labels: " if isinstance(label, list) else "label: "
            _print_line(console, plain, [(name, ""), (_escaped(_label_text(label)), "green")])
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
    title += f"{counted(found.summary.rows, 'row')}; {_BREAK} is a line break; "
    if found.summary.trained_tokens is None and any(any(r.loss_mask) for r in found.examples):
        title += "the loss is computed on the label of each word, at its first token, in "
        return [(title + (f"{_OPEN} {_CLOSE}" if plain else "green"), "")]
    if found.summary.trained_tokens is None:
        return [(title + "the loss is computed on the label", "")]
    if plain:
        return [(f"{title}the loss is computed on text in {_OPEN} {_CLOSE}", "")]
    return [(title, ""), ("trained", "green"), (", ", ""), ("masked", "dim"), (", ", ""),
            ("special token", "bold")]  # fmt: skip


def _about(row: DescribedRow) -> str:
    part, parts = row.part
    text = row.where + (f", training row {part} of {parts}" if parts > 1 else "")
    text += f": {counted(len(row.input_ids), 'token')}"
    if row.label is None:
        text += f", {sum(row.loss_mask):,} trained"
    if row.truncated:
        text += "; truncated" + (", without its end and EOS" if row.cut else "")
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
    masked = "dim" if row.label is None else ""
    style = "green" if piece.trained else masked
    return f"bold {style}".strip() if piece.special else style


def _escaped(text: str) -> str:
    """Mark line breaks; escape control characters, invisible characters and the marks."""
    return "".join(map(_escaped_character, text))


def _escaped_character(character: str) -> str:
    if character == "\n":
        return f"{_BREAK}\n"
    if character == "\t":
        return "\\t"
    visible = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if (visible or character in _JOINERS) and character not in (_OPEN, _CLOSE):
        return character
    return character.encode("unicode-escape", "backslashreplace").decode("ascii")


def _figures(found: Preview) -> list[tuple[str, str]]:
    from lorakit.api import counts_line

    summary = found.summary
    span = f"{summary.min_length:,} to {summary.max_length:,}"
    more = found.training_rows != summary.rows
    split_rows = [("training rows", f"{found.training_rows:,}")] if more else []
    figures = [
        ("rows", f"{summary.rows:,}"),
        *split_rows,
        *([("labels", _escaped(counts_line(found.label_counts)))] if found.label_counts else []),
        ("tokens", f"{summary.tokens:,}"),
        ("tokens per row", f"{span}, {summary.mean_length:,.1f} on average"),
    ]
    if summary.trained_tokens is not None:
        share = f"{summary.trained_tokens:,} ({summary.trained_share:.1%})"
        figures.append(("trained tokens", share))
    lost = f"; {summary.lost_tokens:,} tokens lost" if summary.lost_tokens else ""
    rows = f"{summary.truncated_rows:,} (to {found.limit:,} tokens{lost})"
    figures.append(("truncated rows", rows))
    if summary.cut_completions is not None:
        figures.append(("truncated completions", f"{summary.cut_completions:,}"))
    if summary.bins is not None:
        bins = f"{summary.bins:,} of {found.limit:,} tokens, {summary.bin_fill:.1%} full"
        figures.append(("packed bins", bins))
    return figures
