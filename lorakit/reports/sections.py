"""The parts of a page that are text and tables: results, differences, facts and recipes."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.reports.comparison import Comparison, flat, result_columns, value_text
from lorakit.reports.html import Html, element, joined, table
from lorakit.reports.runs import Run

#: Facts of run.json that are shown elsewhere, are not for a reader, or are long lists.
_NOT_FACTS = frozenset(
    {"adapted_modules", "ranks", "metrics", "message", "process", "launch", "coverage"}
)
_MOST_FACTS = 200


def swatch(number: int) -> Html:
    """The run's color, beside its name."""
    return element("span", class_=f"swatch c{number % 8}", aria_hidden="true")


def results(runs: Sequence[Run], compared: Comparison) -> Html:
    """A row for each run, and what went wrong."""
    columns = result_columns(compared.results)
    rows = [
        [joined([swatch(at), run.name]), *(values[at] for values in columns.values())]
        for at, run in enumerate(runs)
    ]
    problems = [
        element("p", element("strong", f"{run.name}: "), text, class_="problem")
        for run in runs
        for text in (run.message, *run.notes)
        if text
    ]
    return joined([table(["run", *columns], rows, label="Results"), *problems])


def differences(runs: Sequence[Run], compared: Comparison) -> Html:
    """The settings that differ, a column for each run."""
    if len(runs) < 2:
        return Html("")
    if not compared.differences:
        return element("p", "Recipes, versions, hardware and data are the same.")
    rows = [[own.key, *map(value_text, own.values)] for own in compared.differences]
    return table(["setting", *(run.name for run in runs)], rows, label="Settings that differ",
                 numbers=False)  # fmt: skip


def facts(runs: Sequence[Run]) -> Html:
    """What run.json says, a table for each run."""
    return joined(_details(run.name, _fact_table(run)) for run in runs if run.record)


def _details(title: str, *contents: str) -> Html:
    return element("details", element("summary", title), *contents)


def _fact_table(run: Run) -> Html:
    found = [
        [key, value_text(value)]
        for name, inner in run.record.items()
        if name not in _NOT_FACTS
        for key, value in flat(name, inner)
        if value is not None
    ]
    rows = found[:_MOST_FACTS]
    return table(["fact", "value"], rows, label=f"{run.name}: run.json", numbers=False)


def recipes(runs: Sequence[Run]) -> Html:
    """Each run's recipe.yaml as it stands."""
    return joined(
        _details(run.name, element("pre", run.recipe_text, tabindex="0"))
        for run in runs
        if run.recipe_text
    )
