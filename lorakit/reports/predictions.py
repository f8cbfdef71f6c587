"""Predictions of the final evaluation: a confusion matrix, right and wrong examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.reports.html import Html, element, joined, scrolled, table
from lorakit.reports.runs import Run

_MISSING = (
    "No predictions: a run writes predictions.json at its end if its final evaluation predicts "
    "labels or generates text."
)
#: A run writes no more.
_MOST_CLASSES, _MOST_EXAMPLES = 100, 100
#: Shades of a cell, from none to all rows of its label.
_SHADES = 9


def predictions(runs: Sequence[Run]) -> Html:
    """For each run with a predictions.json, what it has; a sentence if there is none."""
    found = [run for run in runs if run.predictions]
    parts = [_of_run(run, opened=len(found) == 1) for run in found]
    return joined(parts) if parts else element("p", _MISSING)


def _of_run(run: Run, opened: bool) -> Html:
    found = run.predictions
    examples = found.get("examples")
    listed = examples[:_MOST_EXAMPLES] if isinstance(examples, list) else []
    known = [example for example in listed if isinstance(example, dict)]
    where = ", ".join(
        f"{key} {found[key]}" for key in ("split", "rows", "step") if found.get(key) is not None
    )
    groups = {
        "wrong": [e for e in known if e.get("right") is False],
        "furthest from the reference": [e for e in known if e.get("right") is None],
        "right": [e for e in known if e.get("right") is True],
    }
    lists = [
        _examples(title, own, opened and title != "right") for title, own in groups.items() if own
    ]
    title = element("h3", run.name, element("small", f" ({where})"))
    return element("article", title, _confusion(found), *lists)


def _confusion(found: Mapping[str, Any]) -> Html:
    """A table with a row per label and a column per predicted class, each cell shaded by its share
    of the label's rows."""
    labels: Any = found.get("labels")
    counts: Any = found.get("confusion")
    if not isinstance(labels, list) or len(labels) > _MOST_CLASSES:
        return Html("")
    if not _is_square(counts, len(labels)):
        return Html("")
    names = [str(label) for label in labels]
    head = element("tr", element("th", "label \\ predicted", scope="col"),
                   *(element("th", name, scope="col") for name in names),
                   element("th", "recall", scope="col"))  # fmt: skip
    rows = []
    for at, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = sum(row)
        cells = [
            element("td", f"{count:,}", class_=f"s{round(_SHADES * count / total) if total else 0}"
                    + (" own" if column == at else ""))
            for column, count in enumerate(row)
        ]  # fmt: skip
        recall = f"{row[at] / total:.3f}" if total else "-"
        rows.append(element("tr", element("th", name, scope="row"), *cells, element("td", recall)))
    totals = [sum(row[at] for row in counts) for at in range(len(names))]
    precision = [
        f"{counts[at][at] / total:.3f}" if total else "-" for at, total in enumerate(totals)
    ]
    last = element("tr", element("th", "precision", scope="row"),
                   *(element("td", value) for value in precision), element("td"))  # fmt: skip
    whole = element("table", element("thead", head),
                    element("tbody", *rows), element("tfoot", last),
                    class_="numbers confusion")  # fmt: skip
    return scrolled(whole, "Confusion matrix")


def _is_square(counts: Any, size: int) -> bool:
    return (
        isinstance(counts, list)
        and len(counts) == size
        and all(
            isinstance(row, list)
            and len(row) == size
            and all(type(count) is int and count >= 0 for count in row)
            for row in counts
        )
    )


def _examples(title: str, examples: Sequence[Mapping[str, Any]], opened: bool) -> Html:
    rows = [
        [str(own.get(key, "")) for key in ("row", "input", "reference", "prediction")]
        for own in examples
    ]
    columns = ["row", "input", "reference", "prediction"]
    summary = element("summary", f"{len(rows)} predictions: {title}")
    contents = table(columns, rows, label=f"Predictions: {title}", numbers=False)
    return element("details", summary, contents, open=opened)
